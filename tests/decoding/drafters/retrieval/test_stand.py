"""STAND keeps running averages of the target's probabilities behind n-grams, and draws from them."""

from collections import Counter

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models, Outcome
from hasten.accel.decoding.drafters.retrieval.ngram_probs import Entry, NGramProbs
from hasten.accel.decoding.drafters.retrieval.stand import Stand
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.errors import UserError

DRAFTER = Stand()


def table(rows, vocabulary=20):
    memory = DRAFTER.new_memory(Models(vocabulary))
    memory.entries.update({ngram: Entry(1, dict(probs)) for ngram, probs in rows.items()})
    return memory


def outcome(tokens, tree, path, token, ids, probs):
    return Outcome(Context.start(tokens), tree, path, token, torch.tensor(ids), torch.tensor(probs))


def test_the_longest_ngram_that_was_seen_is_used():
    rows = {(2, 3): {10: 0.9}, (1, 2, 3): {11: 0.9}, (0, 1, 2, 3): {12: 0.9}}
    for tokens, expected in (([0, 1, 2, 3], 12), ([9, 1, 2, 3], 11), ([9, 9, 2, 3], 10), ([2, 3], 10)):
        assert DRAFTER.propose(Context.start(tokens), table(rows), 1).tokens == [expected]
    assert not len(Stand(min_ngram=2).propose(Context.start([9, 9, 9, 3]), table({(3,): {10: 0.9}}), 8))
    assert DRAFTER.propose(Context.start([9, 9, 9, 3]), table({(3,): {10: 0.9}}), 8).tokens == [10]


def test_probabilities_are_averaged_over_visits_and_missing_ones_count_as_zero():
    memory = DRAFTER.new_memory(Models(20))
    for ids, probs in (([5, 6], [0.6, 0.3]), ([6, 7], [0.9, 0.1]), ([6, 5], [0.6, 0.3])):
        DRAFTER.observe(memory, outcome([1, 2], DraftTree(), [], 3, [ids], [probs]))
    entry = memory.entries[1, 2]
    assert entry.visits == 3
    assert list(entry.probs) == [6, 5, 7]
    assert list(entry.probs.values()) == pytest.approx([(0.3 + 0.9 + 0.6) / 3, (0.6 + 0.3) / 3, 0.1 / 3])


def test_no_more_than_ten_successors_are_kept():
    memory = DRAFTER.new_memory(Models(40))
    for start, top in ((0, 0.09), (10, 0.08)):
        probs = [top - rank / 1000 for rank in range(10)]
        DRAFTER.observe(memory, outcome([1, 2], DraftTree(), [], 3, [list(range(start, start + 10))], [probs]))
    # Halved all of them: 0.09, 0.089, … and 0.08, 0.079, … merge.
    assert set(memory.entries[1, 2].probs) == {*range(10)}


def test_the_accepted_path_is_learned_and_rejected_nodes_unless_that_is_off():
    tree = DraftTree([5, 6, 7], [ROOT, 0, ROOT])
    given = outcome([1, 2, 3, 4], tree, [0], 9, [[10], [11], [12], [13]], [[0.5]] * 4)
    memory = DRAFTER.new_memory(Models(20))
    Stand(min_ngram=2, learns_rejected=False).observe(memory, given)
    expected = {(3, 4): 10, (2, 3, 4): 10, (1, 2, 3, 4): 10, (4, 5): 11, (3, 4, 5): 11, (2, 3, 4, 5): 11}
    assert {ngram: next(iter(entry.probs)) for ngram, entry in memory.entries.items()} == expected
    memory = DRAFTER.new_memory(Models(20))
    Stand(min_ngram=2).observe(memory, given)
    expected |= {(5, 6): 12, (4, 5, 6): 12, (3, 4, 5, 6): 12, (4, 7): 13, (3, 4, 7): 13, (2, 3, 4, 7): 13}
    assert {ngram: next(iter(entry.probs)) for ngram, entry in memory.entries.items()} == expected


def test_the_least_recently_updated_ngrams_are_dropped():
    drafter = Stand(min_ngram=2, max_ngram=2, max_ngrams=2)
    memory = drafter.new_memory(Models(20))
    for tokens in ([1, 1], [2, 2], [1, 1], [3, 3]):
        drafter.observe(memory, outcome(tokens, DraftTree(), [], 3, [[5]], [[0.5]]))
    assert list(memory.entries) == [(1, 1), (3, 3)]


ROW = {4: 0.5, 5: 0.3, 6: 0.1}


def children(temperature):
    return DRAFTER.propose(Context.start([1, 2], Sampling(temperature)), table({(1, 2): ROW}), 5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_children_are_drawn_one_after_the_other_from_what_is_left(temperature):
    weights = {token: prob ** (1 / temperature) for token, prob in ROW.items()}
    total = sum(weights.values())
    draws, memory, context = 2000, table({(1, 2): ROW}), Context.start([1, 2], Sampling(temperature))
    found = Counter(tuple(DRAFTER.propose(context, memory, 5).tokens) for _ in range(draws))
    expected = {
        (first, second, 15 - first - second): weights[first] / total * weights[second] / (total - weights[first])
        for first in ROW
        for second in ROW
        if first != second
    }
    assert sum(expected.values()) == pytest.approx(1)
    statistic = sum((found[key] - draws * prob) ** 2 / (draws * prob) for key, prob in expected.items())
    assert statistic < 20.5  # chi-square of 5 degrees of freedom exceeds it once in a thousand
    assert set(found) <= set(expected)


def test_the_distribution_is_that_of_the_first_draw_at_the_requests_temperature():
    tree = children(0.5)
    assert tree.draft_sampling is DRAFTER.draft_sampling(Sampling(0.5)) is DraftSampling.WITHOUT_REPLACEMENT
    expected = torch.zeros(20)
    expected[[4, 5, 6]] = torch.tensor([0.25, 0.09, 0.01]) / 0.35
    assert tree.draft_probs[ROOT].tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_low_temperature_leaves_out_what_cannot_be_drawn():
    tree = children(0.01)
    assert list(tree.tokens) == [4]
    assert tree.draft_probs[ROOT][4] == 1


def test_greedy_takes_the_most_probable_tokens_in_order_and_the_same_shape():
    tree = children(0.0)
    assert list(tree.tokens) == [4, 5, 6]
    assert tree.draft_sampling is DRAFTER.draft_sampling(Sampling()) is DraftSampling.DETERMINISTIC
    assert tree.draft_probs is None
    memory = table({(a, b): {token: 0.5 - token / 20 for token in range(5)} for a in range(5) for b in range(5)})
    shapes = [DRAFTER.propose(Context.start([0, 0], Sampling(t)), memory, 40).parents for t in (0.0, 1.0)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 40


def test_saved_and_loaded_it_averages_on():
    memory, again = table({(1, 2): ROW, (7, 1, 2): {3: 0.25}}), NGramProbs(20)
    DRAFTER.load(again, DRAFTER.saved(memory))
    assert again.entries == memory.entries
    DRAFTER.load(again, DRAFTER.saved(NGramProbs(20)))
    assert not again.entries


def test_wrong_values_are_refused():
    with pytest.raises(UserError, match="min_ngram=5 must be from 1 to max_ngram=4"):
        Stand(min_ngram=5)
