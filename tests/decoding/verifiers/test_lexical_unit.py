import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows
from hasten.accel.decoding.verifiers.lexical_unit import LexicalUnit
from hasten.accel.errors import UserError

# After the root the target says 0, after 0 it says 1, after 1 and 2 it says 2.
TABLE = [[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9], [0.1, 0.0, 0.9]]


def verdict(tree, temperature=0.0, seed=0):
    logits = torch.tensor(TABLE).log()[[0, *(token + 1 for token in tree.tokens)]]
    rows = TargetRows(logits, tree, Context([], 0, Sampling(temperature=temperature)))
    return LexicalUnit(0.6).verify(tree, rows, torch.Generator().manual_seed(seed))


def test_confident_tokens_are_accepted_whatever_the_target_says():
    for temperature in (0.0, 1.0):
        found = verdict(DraftTree([2, 1], [-1, 0], confidences=[0.7, 0.61]), temperature)
        assert found.path == [0, 1], "the target has both at 0.1 or less"


def test_from_the_first_token_of_little_confidence_on_the_target_decides():
    # 2 is confident; the target says 2 after it, which is drafted; then 1 is not, and the target says 2 instead.
    tree = DraftTree([2, 2, 1], [-1, 0, 1], confidences=[0.7, 0.5, 0.6])
    found = verdict(tree)
    assert (found.path, found.token) == ([0, 1], 2)


def test_of_siblings_the_most_confident_one_is_taken():
    assert verdict(DraftTree([1, 2], [-1, -1], confidences=[0.61, 0.8])).path == [1]


def test_without_confidences_the_target_decides():
    assert verdict(DraftTree([2, 1], [-1, 0])).path == []


def test_a_part_of_a_tree_keeps_its_confidences():
    part = DraftTree([0, 2, 1], [-1, -1, 1], confidences=[0.1, 0.7, 0.61]).keep([1, 2])
    assert verdict(part).path == [0, 1]


def test_it_is_declared_as_not_lossless():
    assert not LexicalUnit.lossless
    assert not LexicalUnit().is_lossless(greedy=True)
    assert not LexicalUnit().is_independent_of_drafts(greedy=True)


def test_a_confidence_out_of_range_is_refused():
    with pytest.raises(UserError, match="confidence=1 is wrong"):
        LexicalUnit(1)
