"""Acceptance by class of node, worked out by hand."""

import pytest

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.acceptance import AcceptanceEstimate, AcceptanceRate, expected_rate
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import DraftTree

TREE = DraftTree([5, 6, 7], [-1, 0, 1], labels=["first", "second", "third"])


def test_a_class_begins_at_one_half_which_two_observations_outweigh():
    rate = AcceptanceRate()
    assert rate.share == 0.5
    rate.add(True)
    rate.add(True)
    assert rate.share == 3 / 4


def test_only_nodes_whose_parent_was_accepted_count_and_probabilities_multiply_along_the_path():
    estimate = AcceptanceEstimate()
    estimate.observe(Outcome(Context.start([0]), TREE, [0], 2))
    # The first was accepted (2 of 3), the second was not (1 of 3), the third was never reached (1 of 2).
    assert estimate.probabilities(TREE) == pytest.approx([2 / 3, 2 / 9, 1 / 9])


def test_the_rate_promised_before_any_draft_is_that_of_the_best_size():
    # Prior acceptance of the first two nodes: 0.5 and 0.5 ** 1.5.
    costs = PassCosts({1: {1: 1.0, 2: 1.2, 3: 3.0}})
    assert expected_rate(costs, 2) == pytest.approx(1.5 / 1.2)
