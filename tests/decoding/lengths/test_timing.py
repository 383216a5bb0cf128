"""The cost of a pass between and beyond measured sizes, and of drafting."""

import pytest
import torch

from hasten.accel.decoding.lengths.timing import DraftingTime, PassCosts, measure_costs
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.models.checkpoint import resolve


def test_costs_between_measured_sizes_are_interpolated():
    costs = PassCosts({1: {1: 2.0, 4: 5.0, 8: 6.0}, 4: {1: 3.0, 4: 9.0}})
    assert costs.seconds(2) == 3.0
    assert costs.seconds(6) == 5.5
    assert costs.seconds(12) == 7.0  # the last step goes on
    assert costs.seconds(4, 4) == 9.0
    assert costs.seconds(4, 2) == pytest.approx(5.0 + 4.0 / 3)  # a third of the way from 1 to 4 sequences
    assert costs.seconds(4, 8) == 18.0  # twice as many sequences as were measured
    assert costs.efficiency(4) == 2 / 5


def test_drafting_time_is_a_line_through_what_was_seen():
    drafting = DraftingTime()
    assert drafting.seconds(8) == 0.0
    for nodes in (2, 4, 8, 16) * 20:
        drafting.add(nodes, 0.5 + 0.1 * nodes)
    assert drafting.seconds(10) == pytest.approx(1.5)


def test_the_time_of_drafts_of_one_size_is_taken_as_that_of_their_tokens():
    drafting = DraftingTime()
    for _ in range(5):
        drafting.add(4, 2.0)
    assert drafting.seconds(8) == pytest.approx(4.0)


def test_costs_are_measured_at_every_size():
    target = load_target(resolve("embedded:draft"), torch.float32)
    costs = measure_costs(target, [4, 16], sequences=2, context=20)
    assert {count: list(by_width) for count, by_width in costs.measured.items()} == {1: [1, 4, 16], 2: [1, 4, 16]}
    assert all(seconds > 0 for by_width in costs.measured.values() for seconds in by_width.values())
    assert costs.seconds(16) == pytest.approx(costs.measured[1][16])
