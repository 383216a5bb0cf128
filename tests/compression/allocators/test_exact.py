import itertools
import random

import pytest

from hasten.accel.compression.allocators.base import Choice, Unit, error, size
from hasten.accel.compression.allocators.budgets import allocate
from hasten.accel.compression.allocators.exact import Exact
from hasten.accel.errors import UserError


def enumerate_all(units):
    """Error and bits of every assignment."""
    choices = itertools.product(*(range(len(unit.choices)) for unit in units))
    return [(error(units, chosen), size(units, chosen)) for chosen in choices]


def solve(units, budget):
    chosen = Exact().choose(units, budget)
    return error(units, chosen), size(units, chosen)


@pytest.mark.parametrize("seed", range(50))
def test_six_layers_with_three_levels_get_what_enumeration_finds(make_units, seed):
    units = make_units(seed, count=6, levels=(2, 3, 4), noise=0.5)
    assert len({unit.weights for unit in units}) > 1
    everything = enumerate_all(units)
    low, high = min(bits for _, bits in everything), max(bits for _, bits in everything)
    for budget in (random.Random(seed).randint(low, high), (2 * low + high) // 3):
        best = min(found for found in everything if found[1] <= budget)
        assert solve(units, budget) == best


@pytest.mark.parametrize("seed", range(10))
def test_sizes_of_1e12_bits_without_a_common_divisor_are_solved_to_the_bit(seed):
    rng = random.Random(seed)
    units = []
    for place in range(6):
        weights = rng.randrange(10**10, 10**11)
        constant = 10 ** rng.uniform(-10, -8)
        choices = [
            Choice(str(bits), weights * bits + rng.randrange(10**6), constant * 4.0**-bits) for bits in (2, 3, 5)
        ]
        units.append(Unit(f"u{place}", (f"u{place}",), 0, "u", weights, tuple(choices)))
    everything = enumerate_all(units)
    # One bit less than a solution on the edge needs: the solution must not come back.
    edge = sorted({bits for _, bits in everything})[len(everything) // 2]
    for budget in (edge, edge - 1):
        assert solve(units, budget) == min(found for found in everything if found[1] <= budget)


@pytest.mark.parametrize("seed", range(10))
def test_nested_parts_are_dropped_where_enumeration_drops_them(with_parts, seed):
    units = with_parts(seed)
    everything = enumerate_all(units)
    rng = random.Random(seed)
    low, high = min(bits for _, bits in everything), max(bits for _, bits in everything)
    for budget in (rng.randint(low, high), rng.randint(low, (low + high) // 3)):
        best_error, best_bits = min(found for found in everything if found[1] <= budget)
        # Sums in another order differ in the last digits.
        assert solve(units, budget) == (pytest.approx(best_error, rel=1e-12), best_bits)


def test_a_part_is_dropped_where_that_frees_more_than_it_costs():
    part = Unit("mlp", (), 0, "mlp", 0, (Choice("drop", 0, 0.5), Choice("keep", 0)))
    inside = Unit("a", ("a",), 0, "a", 10, (Choice("w2", 20, 0.1), Choice("w4", 40, 0.01)), "mlp")
    outside = Unit("b", ("b",), 0, "b", 10, (Choice("w2", 20, 0.6), Choice("w4", 40, 0.1)))
    units = [part, inside, outside]
    assert allocate(Exact(), units, 60) == {"mlp": "keep", "a": "w2", "b": "w4"}
    # Keeping everything at two bits costs 0.7, dropping a for two more bits in b 0.6.
    assert allocate(Exact(), units, 59) == {"mlp": "drop", "a": "w2", "b": "w4"}
    assert error(units, [0, 1, 1]) == 0.6
    assert size(units, [0, 1, 1]) == 40


def test_a_hundred_equal_layers_agree_with_dynamic_programming_over_whole_bits():
    rng = random.Random(0)
    levels = (2, 3, 4, 5, 6)
    errors = [[10 ** rng.gauss(0, 1) * 4.0**-bits * 2 ** rng.gauss(0, 0.5) for bits in levels] for _ in range(100)]
    units = [
        Unit(f"u{place}", ("u",), 0, "u", 8, tuple(Choice(str(b), 8 * b, e) for b, e in zip(levels, own, strict=True)))
        for place, own in enumerate(errors)
    ]
    best = {0: 0.0}
    for own in errors:
        sums = sorted(
            (spent + bits, so_far + e) for spent, so_far in best.items() for bits, e in zip(levels, own, strict=True)
        )
        best = {}
        for spent, total in sums:
            best[spent] = min(best.get(spent, float("inf")), total)
    for mean in (2.25, 3, 3.5, 5):
        least = min(total for spent, total in best.items() if spent <= 100 * mean)
        assert solve(units, int(800 * mean))[0] == pytest.approx(least, rel=1e-12)


def test_the_error_never_rises_when_the_budget_grows(make_units):
    units = make_units(1, count=30, noise=0.5)
    low, high = size(units, [0] * 30), size(units, [3] * 30)
    errors = [solve(units, low + step * (high - low) // 40)[0] for step in range(41)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


def test_of_two_optima_the_one_of_fewer_bits_is_taken():
    def unit(name, *choices):
        return Unit(name, (name,), 0, name, 10, tuple(Choice(str(bits), bits, error) for bits, error in choices))

    # Raising a costs 10 bits, raising b 7, for the same error; only one of them fits.
    units = [unit("a", (20, 4.0), (30, 1.0)), unit("b", (20, 4.0), (27, 1.0)), unit("c", (20, 1.0), (21, 1.0))]
    assert allocate(Exact(), units, 75) == {"a": "20", "b": "27", "c": "20"}


def test_an_instance_beyond_max_states_is_refused(make_units):
    units = make_units(2, count=40, noise=0.5)
    budget = int(3.3 * sum(unit.weights for unit in units))
    assert allocate(Exact(), units, budget)
    with pytest.raises(UserError, match=r"max_states=1 is too few for these 40 units"):
        allocate(Exact(max_states=1), units, budget)


def test_an_error_that_is_no_number_is_refused_by_name(make_units):
    units = make_units(3, count=2)
    wrong = Unit("wrong", ("wrong",), 0, "u", 10, (Choice("w2", 20, float("nan")), Choice("w3", 30, 0.0)))
    with pytest.raises(UserError, match=r"the error of wrong at level w2 is nan"):
        allocate(Exact(), [*units, wrong], size(units, [1, 1]) + 25)
