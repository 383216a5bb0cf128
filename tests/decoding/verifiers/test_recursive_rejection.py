import math

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows
from hasten.accel.decoding.verifiers.recursive_rejection import RecursiveRejection
from hasten.accel.decoding.verifiers.rejection import draws_of

SAMPLED = Sampling(temperature=1.0)
P, Q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.5, 0.25, 0.25])


def shares(tree, count=3000):
    """How often each child was kept, and each token came out instead."""
    rows = TargetRows(P.log().expand(len(tree) + 1, -1), tree, Context([], 0, SAMPLED))
    generator = torch.Generator().manual_seed(0)
    verdicts = [RecursiveRejection().verify(tree, rows, generator) for _ in range(count)]
    kept = [sum(verdict.path == [node] for verdict in verdicts) / count for node in range(len(tree))]
    others = [verdict.token for verdict in verdicts if not verdict.path]
    return kept, [others.count(token) / count for token in range(3)]


def near(share, count=3000):
    """Within five standard deviations of a binomial; where the share is 0 or 1, exactly."""
    return pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))


def test_the_second_sibling_is_tried_against_what_the_first_left():
    # By hand: 0 is kept with .2 / .5. p - q is (-.3, .25, .05), so p2 = (0, 5/6, 1/6); q without 0 is (0, .5, .5).
    # 2 is kept with (1/6) / (1/2) = 1/3. p2 - q2 is (0, 1/3, -1/3): 1 is recovered.
    tree = DraftTree([0, 2], [-1, -1], DraftSampling.WITHOUT_REPLACEMENT, {-1: Q})
    kept, others = shares(tree)
    assert kept == [near(0.4), near(0.6 / 3)]
    assert others == [0, near(0.6 * 2 / 3), 0]


def test_of_independent_draws_the_second_is_tried_against_the_same_distribution():
    # p2 = (0, 5/6, 1/6) as above, and 2 is kept with (1/6) / (1/4) = 2/3; p2 - q is (-, 7/12, -).
    tree = DraftTree([0, 2], [-1, -1], DraftSampling.INDEPENDENT, {-1: Q}, [1, 1])
    kept, others = shares(tree)
    assert kept == [near(0.4), near(0.6 * 2 / 3)]
    assert others == [0, near(0.6 / 3), 0]


def test_a_token_that_was_drawn_twice_is_tried_twice():
    # 1 with q = (.1, .8, .1): .5 / .8, then p2 = (1/3, 0, 2/3), of which nothing is 1.
    q = torch.tensor([0.1, 0.8, 0.1])
    kept, others = shares(DraftTree([1], [-1], DraftSampling.INDEPENDENT, {-1: q}, [2]))
    assert kept == [near(5 / 8)]
    # p2 - q is (7/30, -, 17/30).
    assert others == [near(3 / 8 * 7 / 24), 0, near(3 / 8 * 17 / 24)]


def test_siblings_that_were_not_drawn_are_kept_with_their_own_probabilities():
    kept, others = shares(DraftTree([2, 0], [-1, -1]))
    assert kept == [near(0.3), near(0.2)]
    assert others == [0, near(0.5), 0]


def test_repeated_draws_are_tried_in_every_order():
    tree = DraftTree([1, 0], [-1, -1], DraftSampling.INDEPENDENT, {-1: Q}, [2, 1])
    generator = torch.Generator().manual_seed(0)
    orders = [tuple(draws_of(tree, -1, generator)) for _ in range(900)]
    # DraftSampling of (1, 0, 1) are as likely as those of (1, 1, 0) and (0, 1, 1).
    assert {order: orders.count(order) / 900 for order in set(orders)} == {
        order: near(1 / 3, 900) for order in [(0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }


def test_siblings_beyond_what_could_be_drawn_do_no_harm():
    certain = torch.tensor([1.0, 0.0, 0.0])
    kept, others = shares(DraftTree([0, 1], [-1, -1], DraftSampling.WITHOUT_REPLACEMENT, {-1: certain}), 200)
    assert sum(kept) + sum(others) == pytest.approx(1)
