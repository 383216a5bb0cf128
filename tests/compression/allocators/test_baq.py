import math

import pytest
import torch

from hasten.accel.compression.allocators.baq import BAQ, column_bits, water_fill
from hasten.accel.compression.allocators.base import Choice, Unit, error, size
from hasten.accel.compression.allocators.budgets import allocate
from hasten.accel.compression.allocators.uniform import Uniform
from hasten.accel.errors import UserError


def layer(name, weights, constant, levels=(2, 3, 4, 5), part_of=None):
    """A layer that follows the paper's model exactly."""
    choices = tuple(Choice(f"w{bits}", weights * bits, constant * 4.0**-bits) for bits in levels)
    return Unit(name, (name,), 0, name, weights, choices, part_of)


def test_layers_four_times_as_sensitive_get_a_bit_more():
    # Mean of log2(c) / 2 is 1.5, so R = 3.5 + log2(c) / 2 - 1.5.
    units = [layer("a", 100, 1.0), layer("b", 100, 4.0), layer("c", 100, 16.0), layer("d", 100, 64.0)]
    assert allocate(BAQ(), units, 1400) == {"a": "w2", "b": "w3", "c": "w4", "d": "w5"}


def test_sensitivity_counts_per_weight():
    # c / n is 0.01 and 0.04: a bit apart, n-weighted mean (100 x 3 + 400 x 4) / 500 = 3.8.
    units = [layer("small", 100, 1.0), layer("large", 400, 16.0)]
    assert allocate(BAQ(), units, 1900) == {"small": "w3", "large": "w4"}


def test_a_layer_at_its_limit_leaves_its_bits_to_the_rest():
    # Without limits R = 0, 2, 4, 6 about the mean 3; held at 2 and 5, the rest are 2 apart and sum to 12 - 7.
    units = [layer(str(place), 100, 16.0**place) for place in range(4)]
    wishes = torch.tensor([0.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    rates = water_fill(wishes, ones, 2 * ones, 5 * ones, 12)
    torch.testing.assert_close(rates, torch.tensor([2.0, 2.0, 3.0, 5.0], dtype=torch.float64))
    assert allocate(BAQ(), units, 1200) == {"0": "w2", "1": "w2", "2": "w3", "3": "w5"}


@pytest.mark.parametrize("seed", range(20))
def test_before_rounding_marginal_losses_are_equal_and_the_budget_is_spent(seed):
    generator = torch.Generator().manual_seed(seed)
    constants = 10 ** torch.randn(50, dtype=torch.float64, generator=generator)
    weights = torch.randint(100, 10000, (50,), generator=generator).double()
    lowest = torch.full_like(weights, 2.0)
    highest = torch.randint(3, 8, (50,), generator=generator).double()
    share = torch.rand((), dtype=torch.float64, generator=generator)
    budget = float((weights * (lowest + share * (highest - lowest))).sum())
    rates = water_fill((constants / weights).log2() / 2, weights, lowest, highest, budget)
    assert float((weights * rates).sum()) == pytest.approx(budget, rel=1e-12)
    marginal = constants / weights * 4.0**-rates
    free = (rates > lowest) & (rates < highest)
    assert int(free.sum()) >= 2
    common = marginal[free].mean()
    # Optimal: no layer at its lowest level would gain more than the free ones, none at its highest would lose less.
    torch.testing.assert_close(marginal[free], common.expand(int(free.sum())))
    assert bool((marginal[rates == lowest] <= common * (1 + 1e-9)).all())
    assert bool((marginal[rates == highest] >= common * (1 - 1e-9)).all())


def test_the_remainder_goes_to_the_layer_that_was_cut_most():
    # R = 3.2, 3.5, 3.8 at a mean of 3.5; rounding down leaves 1.5 bits, which is one step.
    units = [layer(name, 100, 4.0**wish) for name, wish in (("a", 0.2), ("b", 0.5), ("c", 0.8))]
    assert allocate(BAQ(), units, 1050) == {"a": "w3", "b": "w3", "c": "w4"}
    assert allocate(BAQ(), units, 1100) == {"a": "w3", "b": "w4", "c": "w4"}


def test_bits_too_few_for_one_layer_go_to_a_smaller_one():
    units = [layer("large", 1000, 1000 * 4.0**0.9), layer("small", 10, 10.0)]
    assert allocate(BAQ(), units, 3030 + 500) == {"large": "w3", "small": "w5"}


def test_the_constant_is_fitted_to_the_levels_that_make_an_error():
    choices = (Choice("w2", 20, 8.0 * 4.0**-2), Choice("w3", 30, 2.0 * 4.0**-3), Choice("keep", 160, 0.0))
    unit = Unit("u", ("u",), 0, "u", 10, choices)
    assert BAQ().log2_constant(unit) == pytest.approx(2.0)  # the mean of log2 8 and log2 2
    assert BAQ(reference="w2").log2_constant(unit) == pytest.approx(3.0)


def test_with_a_reference_no_other_level_is_read(make_units):
    units = make_units(0)
    budget = size(units, [1] * 12)
    other = [
        Unit(
            *(unit.name, unit.layers, unit.block, unit.kind, unit.weights),
            # In the order of the levels, but far from the model.
            tuple(
                choice if choice.level == "w3" else Choice(choice.level, choice.bits, choice.error * factor)
                for choice, factor in zip(unit.choices, (16 ** (place % 4), 1, 0.5, 0.1), strict=True)
            ),
        )
        for place, unit in enumerate(units)
    ]
    assert allocate(BAQ(reference="w3"), other, budget) == allocate(BAQ(reference="w3"), units, budget)
    assert allocate(BAQ(), other, budget) != allocate(BAQ(), units, budget)


def test_a_reference_that_a_layer_lacks_is_refused_with_its_levels(make_units):
    units = make_units(0)
    with pytest.raises(UserError, match=r"reference='w5' is no level of model\.layers\.0\.layer0: it has w2, w3, w4"):
        allocate(BAQ(reference="w5"), units, size(units, [1] * 12))


@pytest.mark.parametrize("seed", range(40))
def test_no_more_error_than_uniform_at_its_own_size(make_units, seed):
    units = make_units(seed, count=42)
    for place in range(4):
        budget = size(units, [place] * 42)
        spread, uniform = (error(units, method.choose(units, budget)) for method in (BAQ(), Uniform()))
        assert spread <= uniform
        if place in (1, 2):
            # Constants a factor of 10 apart, one standard deviation: the paper's GM / AM is far below one.
            assert spread < 0.6 * uniform


def test_a_level_with_more_bits_and_more_error_is_never_taken(make_units):
    units = make_units(1)
    worse = [
        Unit(
            *(unit.name, unit.layers, unit.block, unit.kind, unit.weights),
            tuple(
                Choice(choice.level, choice.bits, choice.error * (100 if choice.level == "w4" else 1))
                for choice in unit.choices
            ),
        )
        for unit in units
    ]
    budget = size(units, [2] * 12)
    assert "w4" not in allocate(BAQ(), worse, budget).values()


def test_layers_without_any_error_stay_at_the_lowest_level(make_units):
    units = [*make_units(2), layer("dead", 1000, 0.0)]
    levels = allocate(BAQ(), units, size(units, [2] * 13))
    assert levels["dead"] == "w2"


def test_parts_are_kept_and_a_budget_that_needs_a_drop_is_refused():
    part = Unit("attention", (), 0, "attention", 0, (Choice("drop", 0, 1.0), Choice("keep", 0)))
    units = [part, layer("a", 100, 1.0, part_of="attention"), layer("b", 100, 64.0)]
    assert allocate(BAQ(), units, 700) == {"attention": "keep", "a": "w2", "b": "w5"}
    with pytest.raises(UserError, match=r"budget=1\.5 needs parts to be dropped, which BAQ does not: it takes 2 bits"):
        allocate(BAQ(), units, 300)


def test_columns_get_the_closed_form():
    losses = torch.tensor([1.0, 4.0, 16.0, 64.0])
    assert column_bits(losses, 3.5, 1, 8).tolist() == [2, 3, 4, 5]
    geometric = losses.log().mean().exp()
    closed = 3.5 + (losses / geometric).log2() / 2
    assert closed.tolist() == pytest.approx([2, 3, 4, 5])


@pytest.mark.parametrize("seed", range(20))
def test_columns_reach_the_mean_within_their_range_and_by_rising_loss(seed):
    generator = torch.Generator().manual_seed(seed)
    losses = 10 ** (2 * torch.randn(173, generator=generator))
    for mean in (1, 2, 2.3, 3.7, 5.99, 8):
        bits = column_bits(losses, mean, 1, 8)
        assert bits.dtype == torch.int64
        assert int(bits.sum()) == round(mean * 173)
        assert 1 <= int(bits.min()) <= int(bits.max()) <= 8
        assert bool((bits[losses.argsort()].diff() >= 0).all())


def test_columns_without_loss_get_the_fewest_bits():
    assert column_bits(torch.tensor([0.0, 1.0, 1.0, 0.0]), 3, 1, 8).tolist() == [1, 5, 5, 1]
    assert column_bits(torch.zeros(3), 2.4, 1, 8).tolist() == [3, 2, 2]


def test_whole_columns_are_as_good_as_any_other_split():
    losses = [3.0, 0.2, 7.0, 0.9]
    bits = column_bits(torch.tensor(losses), 2.5, 1, 4).tolist()

    def total(split):
        return sum(loss * 4.0**-one for loss, one in zip(losses, split, strict=True))

    grid = torch.cartesian_prod(*[torch.arange(1, 5)] * 4)
    assert total(bits) == pytest.approx(min(total(split) for split in grid[grid.sum(1) == 10].tolist()))


@pytest.mark.parametrize("mean", [0.9, 8.1, math.nan])
def test_a_mean_out_of_range_is_refused(mean):
    with pytest.raises(UserError, match=r"mean_bits=.* is out of range: 1 to 8"):
        column_bits(torch.ones(4), mean, 1, 8)
