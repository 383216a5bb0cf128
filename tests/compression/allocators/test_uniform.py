from dataclasses import replace

import pytest

from hasten.accel.compression.allocators.base import Choice, Unit, size
from hasten.accel.compression.allocators.budgets import allocate
from hasten.accel.compression.allocators.uniform import Uniform
from hasten.accel.errors import UserError


def test_all_units_get_the_highest_level_that_fits_and_the_rest_is_not_spent(make_units):
    units = make_units(0)
    four, six = (size(units, [place] * len(units)) for place in (2, 3))
    for budget in (four, four + 1, six - 1):
        assert set(allocate(Uniform(), units, budget).values()) == {"w4"}


def test_a_level_that_one_unit_lacks_is_passed_over(make_units):
    units = make_units(1)
    units[5] = replace(units[5], choices=tuple(choice for choice in units[5].choices if choice.level != "w4"))
    budget = size(make_units(1), [2] * len(units))
    assert set(allocate(Uniform(), units, budget).values()) == {"w3"}


def test_units_without_a_common_level_are_refused_by_name(make_units):
    units = make_units(2, count=3)
    units[0] = replace(units[0], choices=units[0].choices[:2])
    units[2] = replace(units[2], choices=units[2].choices[2:])
    with pytest.raises(UserError, match=rf"no level in common: {units[2].name} has w4, w6, .* share w2, w3"):
        allocate(Uniform(), units, size(units, [1] * 3))


def test_a_budget_below_the_lowest_common_level_is_refused_with_its_size(make_units):
    units = make_units(3, count=3)
    units[1] = replace(units[1], choices=units[1].choices[1:])
    with pytest.raises(UserError, match=r"is below w3, the lowest level that all layers have: it takes 3\.1\d+ bits"):
        allocate(Uniform(), units, size(units, [0, 0, 0]))


def test_parts_that_can_be_dropped_are_kept():
    parts = Unit("attention", (), 0, "attention", 0, (Choice("drop", 0), Choice("keep", 0)))
    layer = Unit("layer", ("layer",), 0, "layer", 100, (Choice("w2", 200), Choice("w3", 300)), "attention")
    assert allocate(Uniform(), [parts, layer], 250) == {"attention": "keep", "layer": "w2"}
    with pytest.raises(UserError, match="is below w2, the lowest level"):
        allocate(Uniform(), [parts, layer], 150)
