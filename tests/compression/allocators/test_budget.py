"""Budgets in bits per weight, gigabytes and milliseconds as limits of a cost."""

import math
from decimal import Decimal

import pytest

from hasten.accel.compression.allocators.base import Choice, Unit
from hasten.accel.compression.allocators.budgets import (
    BITS,
    Gigabytes,
    Milliseconds,
    allocate,
    check_allocator,
    check_budget,
)
from hasten.accel.compression.allocators.exact import Exact
from hasten.accel.errors import UserError


@pytest.mark.parametrize("weights", [63_999_200, 134_515_008, 7_000_000_000])
@pytest.mark.parametrize("budget", ["2.1", "3.25", "4.1", "4.3", "8.7", "3"])
def test_a_budget_is_the_decimal_number_that_was_written(budget, weights):
    assert BITS.limit(float(budget), [unit(weights)]) == int(Decimal(budget) * weights)


def test_the_product_in_floating_point_would_miss_an_exact_level():
    assert int(4.1 * 63_999_200) == 262_396_719
    assert BITS.limit(4.1, [unit(63_999_200)]) == 262_396_720


@pytest.mark.parametrize("budget", [math.inf, -math.inf, math.nan])
def test_a_budget_that_is_no_number_is_refused(budget):
    with pytest.raises(UserError, match=f"budget={budget} is wrong"):
        BITS.limit(budget, [unit(100)])


@pytest.mark.parametrize("bits", [262_396_719, 262_396_720, 262_396_721])
def test_the_lowest_budget_that_a_message_names_is_accepted(bits):
    weights = 63_999_200
    units = [unit(weights, Choice("w4", bits), Choice("w8", 2 * bits))]
    check_budget(units, BITS.limit(float(BITS.lowest(bits, units)), units))


def test_a_budget_of_bytes_counts_the_tensors_that_are_not_compressed():
    units = [unit(100, Choice("w4", 400), Choice("w8", 800))]
    measure = Gigabytes(fixed=10**9 - 50)
    assert measure.limit(1.0, units) == 400
    assert allocate(Exact(), units, measure.limit(1.0, units), measure) == {"a": "w4"}
    with pytest.raises(UserError, match=r"budget=0.99 is below .*w4 \(1 gigabytes\) to w8 \(1\)"):
        allocate(Exact(), units, measure.limit(0.99, units), measure)


def test_a_budget_of_time_chooses_by_cost_and_not_by_size():
    # The level of fewer bits is the slower one.
    choices = (Choice("fp8", 800, 1.0, cost=2 * 10**9), Choice("w4", 400, 2.0, cost=3 * 10**9))
    units = [unit(100, *choices), unit(100, *choices, name="b")]
    measure = Milliseconds(fixed=10**9)
    assert measure.limit(5.0, units) == 4 * 10**9
    assert allocate(Exact(), units, measure.limit(5.0, units), measure) == {"a": "fp8", "b": "fp8"}
    with pytest.raises(UserError, match=r"budget=4.9 is below .*fp8 \(5 milliseconds\)"):
        allocate(Exact(), units, measure.limit(4.9, units), measure)


def test_an_allocator_of_bits_refuses_a_budget_of_time():
    with pytest.raises(UserError, match="allocator=baq spreads bits"):
        check_allocator(True, "baq", Milliseconds())
    check_allocator(True, "baq", Gigabytes(0))


def unit(weights, *choices, name="a"):
    return Unit(name, (name,), 0, name, weights, choices)
