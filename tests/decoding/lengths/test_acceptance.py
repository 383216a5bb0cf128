"""Acceptance by class of node, worked out by hand."""

import pytest

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.acceptance import AcceptanceEstimate, AcceptanceRate, expected_rate
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import DraftTree

TREE = DraftTree([5, 6, 7], [-1, 0, 1], labels=["first", "second", "third"])


def test_a_rate_begins_at_its_prior_which_two_observations_outweigh():
    rate = AcceptanceRate(0.5)
    assert rate.share == 0.5
    rate.add(True)
    rate.add(True)
    assert rate.share == 3 / 4


def test_only_nodes_whose_parent_was_accepted_count_and_probabilities_multiply_along_the_path():
    estimate = AcceptanceEstimate()
    estimate.observe(Outcome(Context.start([0]), TREE, [0], 2))
    # The prior of the rank counts as two observations, 0.8 of them accepted. The first class has one more, accepted;
    # the second begins at the rank's (0.8 + 1) / 3, and was not accepted; the third begins at the rank's 1.8 / 4.
    first, second, third = 1.8 / 3, 1.2 / 3, 1.8 / 4
    assert estimate.probabilities(TREE) == pytest.approx([first, first * second, first * second * third])


def test_a_node_that_was_not_verified_counts_if_the_text_shows_whether_it_is_right():
    estimate, other = AcceptanceEstimate(), AcceptanceEstimate()
    proposed = DraftTree([5, 6, 7, 8], [-1, -1, 0, 2], labels=["first", "second", "third", "fourth"])
    for _ in range(20):
        # None of it was verified; the pass gave 5. Then the same with the first node verified: 7 is known as well.
        estimate.observe(Outcome(Context.start([0]), proposed.keep([]), [], 5))
        other.observe(Outcome(Context.start([0]), proposed.keep([0]), [0], 7))
    assert [rate > 0.9 for rate in estimate.probabilities(proposed)] == [True, False, False, False]
    assert [rate > 0.8 for rate in other.probabilities(proposed)] == [True, False, True, False]
    assert estimate.probabilities(proposed)[1] < 0.05


def test_the_rate_promised_before_any_draft_is_that_of_the_best_size():
    # Prior acceptance of the first two nodes: 0.5 and 0.5 ** 1.5.
    costs = PassCosts({1: {1: 1.0, 2: 1.2, 3: 3.0}})
    assert expected_rate(costs, 2) == pytest.approx(1.5 / 1.2)
