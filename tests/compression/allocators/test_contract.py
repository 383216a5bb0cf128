"""The contract of every allocator in conf/allocator that is not a searcher."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.allocators.base import Allocator, error, size
from hasten.accel.compression.allocators.budgets import allocate
from hasten.accel.errors import UserError

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[3] / "conf" / "allocator").glob("*.yaml"))
    if issubclass(get_class(OmegaConf.load(path)["_target_"]), Allocator)
]


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def allocator(request):
    return instantiate(OmegaConf.load(request.param))


def chosen(units, levels):
    return [unit.index(levels[unit.name]) for unit in units]


def ends(units):
    return size(units, [0] * len(units)), size(units, [len(unit.choices) - 1 for unit in units])


@pytest.mark.parametrize("scale", [1, 10**8], ids=["small", "1e12 bits"])
@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_never_passed_and_every_unit_gets_one_of_its_levels(allocator, make_units, seed, scale):
    units = make_units(seed, scale=scale, noise=0.5)
    rng = random.Random(seed)
    low, high = ends(units)
    for budget in (low, low + 1, high - 1, high, *(rng.randint(low, high) for _ in range(12))):
        levels = allocate(allocator, units, budget)
        assert list(levels) == [unit.name for unit in units]
        assert size(units, chosen(units, levels)) <= budget


def test_the_ends_of_the_range_are_the_lowest_and_the_highest_level(allocator, make_units):
    units = make_units(0)
    low, high = ends(units)
    assert set(allocate(allocator, units, low).values()) == {"w2"}
    assert set(allocate(allocator, units, high).values()) == {"w6"}


def test_the_same_input_gives_the_same_levels(allocator, make_units):
    units = make_units(3)
    budget = sum(ends(units)) // 2
    assert allocate(allocator, units, budget) == allocate(allocator, make_units(3), budget)


def test_a_whole_bit_more_per_weight_makes_less_error(allocator, make_units):
    units = make_units(4)
    low, _ = ends(units)
    budgets = [low + more * sum(unit.weights for unit in units) for more in range(4)]
    errors = [error(units, chosen(units, allocate(allocator, units, budget))) for budget in budgets]
    assert errors == sorted(errors, reverse=True)


def test_a_budget_out_of_reach_is_refused_with_both_levels_named(allocator, make_units):
    units = make_units(5)
    low, high = ends(units)
    with pytest.raises(UserError, match=r"budget=2\.\d+ is below the lowest level: .* from w2 \(2\.1\d+ .* to w6 \(6"):
        allocate(allocator, units, low - 1)
    with pytest.raises(UserError, match=r"budget=6\.\d+ is above the highest level: .* from w2 \(2\.1\d+ .* to w6 \(6"):
        allocate(allocator, units, high + 1)


def test_the_bounds_in_the_message_are_legal_budgets(allocator, make_units):
    units = make_units(6)
    weights = sum(unit.weights for unit in units)
    with pytest.raises(UserError) as refused:
        allocate(allocator, units, 0)
    bounds = [float(text) for text in re.findall(r"\((\d+\.\d+)", str(refused.value))]
    assert len(bounds) == 2
    for bound in bounds:
        assert allocate(allocator, units, int(bound * weights))


def test_one_unit_alone_gets_the_highest_level_that_fits(allocator, make_units):
    units = make_units(7, count=1)
    choices = units[0].choices
    assert allocate(allocator, units, choices[2].bits - 1) == {units[0].name: choices[1].level}
    assert allocate(allocator, units, choices[2].bits) == {units[0].name: choices[2].level}


def test_where_layers_differ_in_their_levels_all_ends_are_named(allocator, make_units):
    units = [replace(unit, choices=unit.choices[place % 2 : 3 + place % 2]) for place, unit in enumerate(make_units(8))]
    with pytest.raises(UserError, match=r"from w2/w3 \(.* to w4/w6 \("):
        allocate(allocator, units, 0)
