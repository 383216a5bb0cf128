import pytest

from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree

#        ┌ 7 ─ 9
# ROOT ──┤   └ 3
#        └ 5
TREE = DraftTree([7, 5, 9, 3], [ROOT, ROOT, 0, 0])


def test_depths_paths_and_children():
    assert TREE.depths == [1, 1, 2, 2]
    assert TREE.path(3) == [0, 3]
    assert TREE.children == {ROOT: [0, 1], 0: [2, 3]}
    assert not TREE.is_chain
    assert [TREE.label(node) for node in range(4)] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_chain_is_a_tree():
    chain = DraftTree.chain([4, 5, 6])
    assert list(chain.parents) == [ROOT, 0, 1]
    assert chain.is_chain
    assert chain.draft_sampling is DraftSampling.DETERMINISTIC


def test_the_first_nodes_are_a_tree():
    assert TREE.first(3) == DraftTree([7, 5, 9], [ROOT, ROOT, 0])
    assert TREE.first(9) is TREE


def test_kept_nodes_find_their_parents():
    assert TREE.keep([0, 3]) == DraftTree([7, 3], [ROOT, 0])


def test_distributions_follow_their_parents():
    import torch

    probs = {ROOT: torch.tensor([0.5, 0.5]), 1: torch.tensor([0.1, 0.9])}
    tree = DraftTree([0, 1, 1], [ROOT, ROOT, 1], DraftSampling.WITHOUT_REPLACEMENT, probs)
    kept = tree.keep([1, 2])
    assert kept.draft_probs is not None
    assert kept.draft_probs[0] is probs[1]
    assert kept.draft_probs[ROOT] is probs[ROOT]


def test_a_child_before_its_parent_is_refused():
    with pytest.raises(AssertionError):
        DraftTree([1, 2], [1, ROOT])
