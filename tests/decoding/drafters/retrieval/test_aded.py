"""ADED: trigram scores that adapt, and two searches over them."""

from math import log, sqrt

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models, Outcome
from hasten.accel.decoding.drafters.retrieval.aded import Aded, Trigrams, _Node
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.errors import UserError

STEP = 0.04


def matrix(rows):
    memory = Aded().new_memory(Models(100))
    memory.scores.update(rows)
    return memory


def paths(tree):
    return [tuple(tree.tokens[each] for each in tree.path(node)) for node in range(len(tree))]


# After 1 2: 3 (3/4) or 4 (1/4); after 2 3: 5 (2/3) or 6 (1/3); after 2 4: 7; after 3 5: 8.
ROWS = {(1, 2): {4: 0.25, 3: 0.75}, (2, 3): {5: 0.2, 6: 0.1}, (2, 4): {7: 0.5}, (3, 5): {8: 0.1}}


def test_learning_a_text_adds_its_normalised_frequencies():
    memory = Aded().new_memory(Models(10))
    Aded().learn(memory, [1, 2, 3, 1, 2, 3, 1, 2, 4])
    assert memory.scores[1, 2] == {3: 2 / 3, 4: 1 / 3}
    assert memory.scores[2, 3] == {1: 1.0}
    Aded().learn(memory, [1, 2, 4])
    assert memory.scores[1, 2] == {3: 2 / 3, 4: 4 / 3}


def test_every_pass_raises_the_trigrams_of_the_last_16_tokens_by_a_step():
    drafter, memory = Aded(learns_prompt=False), Trigrams()
    context = Context.start(list(range(20)))
    drafter.begin(context, memory)
    assert memory.scores == {(first, first + 1): {first + 2: STEP} for first in range(4, 18)}
    drafter.observe(memory, Outcome(context, DraftTree([20], [ROOT]), [0], 21))
    assert memory.scores[5, 6] == {7: STEP}
    assert memory.scores[6, 7] == {8: 2 * STEP}
    assert memory.scores[18, 19] == {20: STEP}
    assert memory.scores[19, 20] == {21: STEP}


def test_a_prompt_counts_as_decoded():
    memory = Trigrams()
    Aded().begin(Context.start(list(range(40))), memory)
    assert memory.scores[0, 1] == {2: pytest.approx(14 * STEP)}
    assert memory.scores[37, 38] == {39: STEP}
    assert all(len(row) == 1 for row in memory.scores.values())
    assert len(memory.scores) == 38


def test_decoding_raises_scores_to_the_cap_and_never_lowers_a_learned_one():
    drafter, memory = Aded(cap=0.1), matrix({(0, 0): {0: 0.0}, (7, 7): {7: 5.0}})
    for token in (0, 7):
        drafter.begin(Context.start([token] * 16), memory)
    assert memory.scores[0, 0] == {0: 0.1}
    assert memory.scores[7, 7] == {7: 5.0}


def test_the_weakest_successor_and_the_pair_not_seen_for_longest_go():
    drafter = Aded(successors=2, max_pairs=2)
    memory = drafter.new_memory(Models(10))
    drafter.learn(memory, [1, 2, 3, 1, 2, 3, 1, 2, 4])
    assert list(memory.scores) == [(2, 3), (3, 1)]
    memory = matrix({(1, 2): {3: 0.5, 4: 0.3}})
    drafter.begin(Context.start([1, 2, 5]), memory)
    assert memory.scores[1, 2] == {3: 0.5, 5: STEP}


def test_best_first_takes_the_most_probable_paths_in_order():
    tree = Aded().propose(Context.start([1, 2]), matrix(ROWS), 5)
    # 3: 3/4; 3 5: 1/2; 3 5 8: 1/2; then 4, 4 7 and 3 6 with 1/4 each.
    assert paths(tree)[:3] == [(3,), (3, 5), (3, 5, 8)]
    assert set(paths(tree)[3:]) <= {(4,), (4, 7), (3, 6)}
    assert len(Aded().propose(Context.start([1, 2]), matrix(ROWS), 99)) == 6


def test_no_path_is_longer_than_length():
    loop = matrix({(1, 1): {1: 1.0}})
    for search in ("best_first", "mcts"):
        assert max(Aded(search=search, length=3).propose(Context.start([1, 1]), loop, 50).depths) == 3


def test_the_bound_of_a_child_by_hand():
    first = _Node((0, 1), prior=0.5, visits=4, value=8.0)
    second = _Node((0, 2), prior=0.1, visits=1, value=3.0)
    parent = _Node((9, 0), visits=5, children=[first, second])
    weight = (32 + log((5 + 8 + 1) / 8)) * sqrt(5)
    assert 8 / 4 + weight * 0.5 / 5 > 3 / 1 + weight * 0.1 / 2
    assert Aded()._select(parent) is first
    # Without exploration the higher mean wins.
    assert Aded(c1=-log(14 / 8))._select(parent) is second
    unvisited = _Node((0, 3))
    parent.children.append(unvisited)
    assert Aded()._select(parent) is unvisited


def test_one_iteration_expands_all_steps_to_the_last_and_backs_up_one_plus_the_scores_on_the_way():
    root = Aded(iterations=1)._search(matrix(ROWS), (1, 2), torch.Generator())
    assert [child.pair for child in root.children] == [(2, 4), (2, 3)]
    last = root.children[1]
    assert root.children[0].visits == 0
    assert (root.visits, last.visits) == (1, 1)
    # 0.75 and then 0.2 + … or 0.1, as the roll-out goes; a path of the search has 3 tokens.
    assert root.value == last.value
    assert last.value in {1 + 0.75 + 0.2 + 0.1, 1 + 0.75 + 0.1}


def test_the_search_rolls_out_in_proportion_to_the_scores():
    generator = torch.Generator().manual_seed(0)
    memory = matrix({(1, 2): {3: 1.0}, (2, 3): {4: 3.0, 5: 1.0}})
    values = [Aded(iterations=1)._search(memory, (1, 2), generator).value for _ in range(2000)]
    # 1 + 1 + 3 three times of four; 4 standard deviations of 2000 draws.
    assert set(values) == {5.0, 3.0}
    assert abs(values.count(5.0) / 2000 - 0.75) < 4 * sqrt(0.75 * 0.25 / 2000)


def test_mcts_explores_a_weak_child_more_where_the_exploration_weight_is_larger():
    visits = {}
    for c1 in (0.0, 1000.0):
        root = Aded(c1=c1)._search(
            matrix({(1, 2): {3: 3.0, 4: 2.9, 5: 0.01}, (2, 5): {6: 9.0}}), (1, 2), torch.Generator()
        )
        assert root.visits == 150
        assert sum(child.visits for child in root.children) == 150
        visits[c1] = {child.pair[1]: child.visits for child in root.children}
    # 5 leads to a good token but is rare itself: the mean favours it, the prior does not.
    assert visits[0.0][5] > 75 > visits[1000.0][5]


def test_mcts_proposes_the_most_visited_each_followed_by_its_most_probable_successor():
    rows = {**ROWS, (5, 8): {9: 1.0}}
    tree = Aded(search="mcts").propose(Context.start([1, 2]), matrix(rows), 99)
    assert set(paths(tree)) == {(3,), (4,), (3, 5), (3, 6), (4, 7), (3, 5, 8), (3, 5, 8, 9)}
    # The last one comes from the extension only.
    assert tree.depths.count(4) == 1
    assert paths(Aded(search="mcts").propose(Context.start([1, 2]), matrix(rows), 2)) == [(3,), (3, 5)]


def test_unknown_pairs_and_short_contexts_propose_nothing():
    for search in ("best_first", "mcts"):
        for tokens in ([2], [9, 9]):
            assert not len(Aded(search=search).propose(Context.start(tokens), matrix(ROWS), 8))


def test_labels_are_fewer_than_a_hundred():
    generator = torch.Generator().manual_seed(0)
    memory = Trigrams()
    Aded().learn(memory, torch.randint(6, (5000,), generator=generator).square().tolist())
    labels = set()
    for pair in list(memory.scores):
        labels |= set(Aded().propose(Context.start(list(pair)), memory, 60).labels)
    assert 10 < len(labels) < 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"search": "dfs"}, "search='dfs' must be one of best_first, mcts"),
        ({"length": 1}, "length=1 must be 2 or more"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Aded(**fields)
