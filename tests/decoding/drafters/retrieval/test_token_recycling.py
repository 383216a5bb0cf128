"""Token Recycling fills a fixed tree from the target's most probable successors of every token it has seen."""

from collections import Counter

import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models, Outcome
from hasten.accel.decoding.drafters.retrieval.token_recycling import TEMPLATE, TokenRecycling
from hasten.accel.decoding.tree import ROOT, DraftTree

DRAFTER = TokenRecycling()


def matrix(vocabulary=100):
    """The token t has the successors t + 1, t + 2, …, t + 8."""
    memory = DRAFTER.new_memory(Models(vocabulary))
    memory[:] = [[(token + rank) % vocabulary for rank in range(1, 9)] for token in range(vocabulary)]
    return memory


def test_the_template_is_the_papers_tree_of_80_nodes_and_6_levels():
    assert len(set(TEMPLATE)) == 80
    assert Counter(map(len, TEMPLATE)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert {path for path in TEMPLATE if len(path) == 6} == {(0,) * 6, (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0)}
    assert all(path[:-1] in TEMPLATE for path in TEMPLATE if len(path) > 1)
    assert all((*path[:-1], path[-1] - 1) in TEMPLATE for path in TEMPLATE if path[-1])


def test_a_full_matrix_fills_the_whole_template():
    tree = DRAFTER.propose(Context.start([0]), matrix(), 100)
    # A node's token is its parent's and one more than its rank, so that a path of ranks can be read from it.
    ranks = {ROOT: ()}
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        ranks[node] = (*ranks[parent], token - (0 if parent == ROOT else tree.tokens[parent]) - 1)
    assert len(tree) == 80
    assert {ranks[node] for node in range(80)} == set(TEMPLATE)


def test_a_small_budget_takes_first_what_stands_first_in_a_large_one():
    whole = DRAFTER.propose(Context.start([0]), matrix(), 80)
    assert DRAFTER.propose(Context.start([0]), matrix(), 4) == whole.first(4)
    # A chain of first ranks and then the second one, by how often they are accepted.
    assert list(whole.tokens[:4]) == [1, 2, 2, 3]
    assert list(whole.parents[:4]) == [ROOT, 0, ROOT, 1]


def test_rejected_nodes_are_learned_too_and_the_accepted_one_of_the_same_token_wins():
    memory = DRAFTER.new_memory(Models(50))
    # 7 stands twice: at node 1, accepted, and at node 2, rejected.
    tree = DraftTree([5, 7, 7], [ROOT, 0, ROOT])
    top = torch.arange(32).view(4, 8)
    DRAFTER.observe(memory, Outcome(Context.start([3]), tree, [0, 1], 9, top, torch.zeros(4, 8)))
    assert memory[3] == list(range(8))
    assert memory[5] == list(range(8, 16))
    assert memory[7] == list(range(16, 24))
    assert [token for token, row in enumerate(memory) if row] == [3, 5, 7]
    DRAFTER.observe(memory, Outcome(Context.start([3]), tree, [], 9, top, torch.zeros(4, 8)))
    assert memory[7] == list(range(24, 32))


def test_a_token_that_was_never_seen_proposes_nothing():
    assert not len(DRAFTER.propose(Context.start([0]), DRAFTER.new_memory(Models(50)), 8))


def test_saved_is_the_matrix_and_loads_into_a_new_one():
    memory = DRAFTER.new_memory(Models(20))
    memory[4] = list(range(8))
    saved = DRAFTER.saved(memory)
    assert saved["successors"].shape == (20, 8)
    assert bool((saved["successors"][:4] == -1).all())
    again = DRAFTER.new_memory(Models(20))
    DRAFTER.load(again, saved)
    assert again == memory
