from collections import Counter
from itertools import islice, permutations

import pytest
import torch

from hasten.accel.decoding.drafters.without_replacement import draw_distinct, ranked
from tests.decoding.markov import is_drawn_from

Q = torch.tensor([0.5, 0.25, 0.0, 0.15, 0.1])


def test_ordered_pairs_are_drawn_without_replacement():
    generator = torch.Generator().manual_seed(0)
    counts = Counter(tuple(taken.token for taken in islice(draw_distinct(Q, generator), 2)) for _ in range(20_000))
    q = Q.tolist()
    assert is_drawn_from(counts, {(a, b): q[a] * q[b] / (1 - q[a]) for a, b in permutations((0, 1, 3, 4), 2)})


def test_triples_are_drawn_without_replacement():
    generator = torch.Generator().manual_seed(1)
    counts = Counter(tuple(taken.token for taken in islice(draw_distinct(Q, generator), 3)) for _ in range(5000))
    q = Q.tolist()
    expected = {
        (a, b, c): q[a] * q[b] / (1 - q[a]) * q[c] / (1 - q[a] - q[b]) for a, b, c in permutations((0, 1, 3, 4), 3)
    }
    assert is_drawn_from(counts, expected)


def test_it_ends_when_all_that_is_possible_was_drawn():
    found = list(draw_distinct(Q, torch.Generator().manual_seed(0)))
    assert sorted(taken.token for taken in found) == [0, 1, 3, 4]
    assert [taken.prob for taken in found] == pytest.approx([float(Q[taken.token]) for taken in found])
    left = [1 - sum(taken.prob for taken in found[:count]) for count in range(4)]
    assert [taken.remaining for taken in found] == pytest.approx(left)


def test_a_large_distribution_is_drawn_to_its_end():
    probs = (30 * torch.randn(500, generator=torch.Generator().manual_seed(2))).softmax(-1)
    tokens = [taken.token for taken in draw_distinct(probs, torch.Generator().manual_seed(3))]
    assert len(set(tokens)) == len(tokens)
    assert probs[tokens].sum().item() == pytest.approx(1.0)


def test_ranked_takes_the_most_probable_ones_and_leaves_out_the_impossible():
    assert [taken.token for taken in ranked(Q, 3)] == [0, 1, 3]
    assert [taken.token for taken in ranked(Q, 9)] == [0, 1, 3, 4]
    assert [taken.remaining for taken in ranked(Q, 3)] == pytest.approx([1.0, 0.5, 0.25])
