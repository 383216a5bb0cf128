"""A budget in bits per weight as a number of bits."""

import math
from decimal import Decimal

import pytest

from hasten.accel.compression.allocators.base import Choice, Unit, budget_bits, check_budget, lowest_budget
from hasten.accel.errors import UserError


@pytest.mark.parametrize("weights", [63_999_200, 134_515_008, 7_000_000_000])
@pytest.mark.parametrize("budget", ["2.1", "3.25", "4.1", "4.3", "8.7", "3"])
def test_a_budget_is_the_decimal_number_that_was_written(budget, weights):
    assert budget_bits(float(budget), weights) == int(Decimal(budget) * weights)


def test_the_product_in_floating_point_would_miss_an_exact_level():
    assert int(4.1 * 63_999_200) == 262_396_719
    assert budget_bits(4.1, 63_999_200) == 262_396_720


@pytest.mark.parametrize("budget", [math.inf, -math.inf, math.nan])
def test_a_budget_that_is_no_number_is_refused(budget):
    with pytest.raises(UserError, match=f"budget={budget} is wrong"):
        budget_bits(budget, 100)


@pytest.mark.parametrize("bits", [262_396_719, 262_396_720, 262_396_721])
def test_the_lowest_budget_that_a_message_names_is_accepted(bits):
    weights = 63_999_200
    unit = Unit("a", ("a",), 0, "a", weights, (Choice("w4", bits), Choice("w8", 2 * bits)))
    check_budget([unit], budget_bits(float(lowest_budget(bits, weights)), weights))
