import torch

from hasten.accel.decoding.sampling import Sampling, draw
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from tests.decoding.verifiers.drafts import KINDS, TARGET, rows

SAMPLED = Sampling(temperature=1.0)


def first(kind, seed):
    """The first token of a pass over a tree of that kind."""
    tree = next(KINDS[kind].trees(1, seed))
    verdict = SampleAndMatch().verify(tree, rows(tree, SAMPLED), torch.Generator().manual_seed(seed))
    return [*(tree.tokens[node] for node in verdict.path), verdict.token][0]


def test_every_token_that_comes_out_takes_one_number():
    for tree in KINDS["tree"].trees(20):
        generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
        verdict = SampleAndMatch().verify(tree, rows(tree, SAMPLED), generator)
        torch.rand(len(verdict.path) + 1, dtype=torch.float64, generator=twin)
        assert torch.equal(generator.get_state(), twin.get_state())


def test_the_first_token_is_the_same_whatever_is_drafted():
    wanted = [draw(TARGET[0], torch.Generator().manual_seed(seed)) for seed in range(20)]
    for kind in KINDS:
        assert [first(kind, seed) for seed in range(20)] == wanted


def test_it_goes_down_as_far_as_the_draws_are_drafted():
    everything = DraftTree([0, 1, 2, 3, 4], [-1] * 5)
    verdict = SampleAndMatch().verify(everything, rows(everything, SAMPLED), torch.Generator().manual_seed(0))
    assert len(verdict.path) == 1
    nothing = DraftTree([4], [-1])  # a token that the target never gives
    assert SampleAndMatch().verify(nothing, rows(nothing, SAMPLED), torch.Generator()).path == []
