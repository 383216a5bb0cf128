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
    # A prior of one half counts as two observations. The first was accepted (2 of 3), the second was not (1 of 3); the
    # third was never reached: it begins at the rate of all nodes of its rank below the first depth (1 of 3).
    assert estimate.probabilities(TREE) == pytest.approx([2 / 3, 2 / 9, 2 / 27])


def test_a_node_that_was_not_verified_counts_if_the_text_shows_whether_it_is_right():
    estimate, other = AcceptanceEstimate(), AcceptanceEstimate()
    proposed = DraftTree([5, 6, 7, 8], [-1, -1, 0, 2], labels=["first", "second", "third", "fourth"])
    for _ in range(20):
        # None of it was verified; the pass gave 5. Then the same with the first node verified: 7 is known as well.
        estimate.observe(Outcome(Context.start([0]), proposed.keep([]), [], 5))
        other.observe(Outcome(Context.start([0]), proposed.keep([0]), [0], 7))
    assert [rate > 0.8 for rate in estimate.probabilities(proposed)[:3]] == [True, False, False]
    assert [rate > 0.8 for rate in other.probabilities(proposed)[:3]] == [True, False, True]
    assert estimate.probabilities(proposed)[1] < 0.05


def test_a_proposal_is_followed_through_later_passes_until_the_text_leaves_it():
    estimate, chain = AcceptanceEstimate(), DraftTree.chain([5, 6, 7, 8], labels=["a", "b", "c", "d"])
    context = Context.start([0])
    for number, token in enumerate((5, 6, 9, 8)):
        tree = chain.keep([]) if number == 0 else DraftTree()
        estimate.observe(Outcome(context, tree, [], token))
    rates = {label: (rate.seen - 2, rate.share > 0.5) for label, rate in estimate._rates.items()}
    assert rates == {"a": (1, True), "b": (1, True), "c": (1, False)}


def test_the_rate_promised_before_any_draft_is_that_of_the_best_size():
    # Prior acceptance of the first two nodes: 0.5 and 0.5 ** 1.5.
    costs = PassCosts({1: {1: 1.0, 2: 1.2, 3: 3.0}})
    assert expected_rate(costs, 2) == pytest.approx(1.5 / 1.2)
