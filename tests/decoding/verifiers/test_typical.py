import math

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows
from hasten.accel.decoding.verifiers.typical import Typical
from hasten.accel.errors import UserError


def verdict(tree, table, seed=0, verifier=None):
    """table: the distribution of the first token, and of the one after each token."""
    logits = torch.tensor(table).log()[[0, *(token + 1 for token in tree.tokens)]]
    rows = TargetRows(logits, tree, Context([], 0, Sampling(temperature=1.0)))
    return (verifier or Typical()).verify(tree, rows, torch.Generator().manual_seed(seed))


def test_the_threshold_falls_with_the_entropy():
    # By hand: four tokens alike have entropy ln 4, and .09 exp(-ln 4) = .0225; one-hot .09 exp(0).
    assert Typical().threshold(torch.full((4,), 0.25)) == pytest.approx(0.0225)
    assert Typical().threshold(torch.tensor([1.0, 0.0])) == pytest.approx(0.09)
    assert Typical(epsilon=0.01).threshold(torch.full((4,), 0.25)) == 0.01


def test_what_is_just_above_the_threshold_is_always_kept_and_what_is_below_never():
    rest = 1 - 0.9
    entropy = -0.9 * math.log(0.9) - rest * math.log(rest)
    table = [[0.9, rest]] + [[0.5, 0.5]] * 2
    for delta, kept in ((rest * math.exp(entropy) * 0.999, [0]), (rest * math.exp(entropy) * 1.001, [])):
        for seed in range(20):
            assert verdict(DraftTree([1], [-1]), table, seed, Typical(epsilon=1.0, delta=delta)).path == kept


def test_the_longest_path_wins_and_of_two_the_more_probable():
    table = [[0.8, 0.2, 0.0], [0.05, 0.05, 0.9], [0.0, 0.3, 0.7], [0.4, 0.3, 0.3]]
    assert verdict(DraftTree([0, 1, 2, 1], [-1, -1, 1, 1]), table).path == [1, 2]
    assert verdict(DraftTree([1, 0, 2, 2], [-1, -1, 0, 1]), table).path == [1, 3]
    assert verdict(DraftTree([2, 0], [-1, 0]), table).path == []


def test_a_kept_token_is_followed_by_the_targets_own():
    table = [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]
    assert {verdict(DraftTree([token], [-1]), table).token for token in (0, 0)} == {1}
    assert {verdict(DraftTree([1], [-1]), table, seed).token for seed in range(10)} == {0}


def test_it_is_not_lossless():
    # A draft of the less probable token is always kept: it says so.
    assert not Typical.lossless
    assert all(verdict(DraftTree([1], [-1]), [[0.8, 0.2]] * 3, seed).path == [0] for seed in range(50))


@pytest.mark.parametrize(("name", "value"), [("epsilon", 0), ("epsilon", 1.5), ("delta", -1)])
def test_what_is_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"{name}={value} is wrong"):
        Typical(**{name: value})
