from collections import Counter

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.errors import UserError
from tests.decoding.markov import MarkovTarget, grown, is_drawn_from, random_table
from tests.models import tiny

TABLE = random_table(6, order=2)
WARM = Sampling(temperature=1.0)


def prompts(lengths=(5, 9, 3)):
    tokens = tiny.tokens(batch=len(lengths)).tolist()
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)]


def test_at_temperature_0_it_writes_its_most_probable_tokens():
    tree = DraftModel(length=4).propose(Context.start([1, 2]), SmallModel(MarkovTarget(TABLE)), budget=8)
    wanted = [1, 2]
    for _ in range(4):
        wanted.append(int(TABLE[wanted[-2], wanted[-1]].argmax()))
    assert tree.tokens == wanted[2:]
    assert tree.is_chain
    assert (tree.draft_sampling, tree.draft_probs) == (DraftSampling.DETERMINISTIC, None)


def test_what_it_draws_from_is_what_it_says():
    context = Context.start([1, 2], Sampling(temperature=0.8, top_k=3))
    tree = DraftModel(length=4).propose(context, SmallModel(MarkovTarget(TABLE)), budget=3)
    path = [1, 2, *tree.tokens]
    assert len(tree) == 3
    for node in range(ROOT, 2):
        assert torch.equal(tree.draft_probs[node], context.sampling.probs(TABLE[path[node + 1], path[node + 2]]))
        assert tree.draft_probs[node][tree.tokens[node + 1]] > 0


def test_chains_are_drawn_from_the_draft_model():
    table = random_table(3)
    memory, context = SmallModel(MarkovTarget(table)), Context.start([0], WARM)
    counts = Counter(tuple(grown(DraftModel(length=2), memory, context, 2).tokens) for _ in range(3000))
    q = table.softmax(-1).tolist()
    assert is_drawn_from(counts, {(a, b): q[0][a] * q[a][b] for a in range(3) for b in range(3)})


@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(repetition_penalty=1.3)])
def test_several_sequences_draft_together_what_they_draft_alone(sampling):
    model = tiny.build("llama")
    drafter, together = DraftModel(), SmallModel(TransformersTarget(model))
    contexts = [Context.start(prompt, sampling, seed) for seed, prompt in enumerate(prompts())]
    others = [Context.start(prompt, sampling, seed) for seed, prompt in enumerate(prompts())]
    alone = SmallModel(TransformersTarget(model))
    for accepted in (2, 0, 5):
        trees = drafter.propose_all(contexts, together, 6)
        for tree, context, other in zip(trees, contexts, others, strict=True):
            assert tree.tokens == drafter.propose(other, alone, 6).tokens
            for each in (context, other):
                each.tokens += [*tree.tokens[:accepted], 11]


def test_several_sequences_take_the_passes_of_one():
    memory = SmallModel(MarkovTarget(TABLE))
    DraftModel(length=4).propose_all([Context.start([1, 2, 3][:length]) for length in (1, 2, 3)], memory, 8)
    assert memory.target.passes == [(3, 3), (3, 1), (3, 1), (3, 1)]


def test_behind_the_end_of_its_context_nothing_is_drafted_and_others_go_on():
    memory = SmallModel(MarkovTarget(TABLE, max_length=10))
    trees = DraftModel(length=3).propose_all([Context.start([1] * 8), Context.start([1] * 7)], memory, 8)
    assert [len(tree) for tree in trees] == [0, 3]


def test_ids_that_the_target_does_not_know_are_never_drafted():
    table = TABLE.clone()
    table[..., 4:] += 100  # rows of padding that the target has not
    models = Models(4, lambda: MarkovTarget(table))
    for sampling in (Sampling(), WARM):
        tree = DraftModel().propose(Context.start([1, 2], sampling), DraftModel().new_memory(models), 8)
        assert len(tree) == 5
        assert max(tree.tokens) < 4


def test_an_empty_chain_is_refused():
    with pytest.raises(UserError, match=r"length=0 must be 1 or more"):
        DraftModel(length=0)
