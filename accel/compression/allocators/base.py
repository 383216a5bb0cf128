"""Base class of allocators, which choose a level for every unit within a budget of bits, and the units themselves."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from hasten.accel.errors import UserError

# Level of a dropped part of the model.
DROP = "drop"
# Kinds of parts that can be dropped.
ATTENTION, MLP, BLOCK = "attention", "mlp", "block"


@dataclass(frozen=True)
class Choice:
    """One level that a unit may get.

    level: its name. bits: exact size of the whole unit at this level, including scales, zero points and masks. error:
    its contribution to the model's error, in any measure that is additive over units.
    """

    level: str
    bits: int
    error: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Layers that get the same level, or a part of a block that can be dropped.

    name: unique; the name of the first layer. layers: names of the layers. kind: equal for corresponding units of
    different blocks. weights: number of weights; 0 for a part, whose layers are units themselves. choices: by ascending
    bits, with distinct levels. A part has the choices `drop`, with the bits that a file must still hold, and `keep`,
    with 0 bits. part_of: name of the part that contains this unit; None where no part does. If it is dropped, the bits
    of this unit do not count.
    """

    name: str
    layers: tuple[str, ...]
    block: int
    kind: str
    weights: int
    choices: tuple[Choice, ...]
    part_of: str | None = None

    def index(self, level: str) -> int:
        """Index of a level among the choices; ValueError where it is none of them."""
        return [choice.level for choice in self.choices].index(level)


def left_out(units: Sequence[Unit], chosen: Sequence[int]) -> list[bool]:
    """Whether each unit lies in a dropped part, directly or in a part of it."""
    dropped = {unit.name for unit, index in zip(units, chosen, strict=True) if unit.choices[index].level == DROP}
    if not dropped:
        return [False] * len(units)
    outer = {unit.name: unit.part_of for unit in units}

    def is_dropped(part: str | None) -> bool:
        while part is not None and part not in dropped:
            part = outer[part]
        return part is not None

    return [is_dropped(unit.part_of) for unit in units]


def size(units: Sequence[Unit], chosen: Sequence[int]) -> int:
    """Bits of all units at these choices; units in dropped parts do not count."""
    omitted = left_out(units, chosen)
    return sum(unit.choices[index].bits for unit, index, out in zip(units, chosen, omitted, strict=True) if not out)


def error(units: Sequence[Unit], chosen: Sequence[int]) -> float:
    """Sum of the choices' errors; units in dropped parts do not add to the error of dropping the part."""
    omitted = left_out(units, chosen)
    return math.fsum(
        unit.choices[index].error for unit, index, out in zip(units, chosen, omitted, strict=True) if not out
    )


def budget_bits(budget: float, weights: int) -> int:
    """Bits of all weights together at a budget of bits per weight, rounded down; UserError where it is not finite."""
    if not math.isfinite(budget):
        raise UserError(f"budget={budget} is wrong: expected a number of bits per weight")
    # The budget is the decimal number that was written. Its product in floating point may be a bit below an exact
    # level: 4.1 * 63,999,200 is 262,396,719.99999997.
    return int(Fraction(repr(float(budget))) * weights)


def lowest_budget(bits: int, weights: int) -> str:
    """The lowest budget of bits per weight, with four decimals at most, that holds this many bits."""
    return f"{-(-bits * 10**4 // weights) / 10**4:g}"


def check_budget(units: Sequence[Unit], budget: int) -> None:
    """UserError, which names the lowest and the highest level, where the budget is below the one or above the other."""
    weights = sum(unit.weights for unit in units)
    low = size(units, [0] * len(units))
    high = size(units, [len(unit.choices) - 1 for unit in units])
    if not low <= budget <= high:
        # Rounded inwards, so that the printed bounds are legal budgets.
        lowest = f"{_names(units, 0)} ({lowest_budget(low, weights)} bits per weight)"
        highest = f"{_names(units, -1)} ({high * 10**4 // weights / 10**4:g})"
        side = "below the lowest" if budget < low else "above the highest"
        raise UserError(f"budget={budget / weights:.5g} is {side} level: they reach from {lowest} to {highest}")


def check_errors(units: Sequence[Unit]) -> None:
    """UserError, which names the level, where an error is not a finite number."""
    for unit in units:
        for choice in unit.choices:
            if not math.isfinite(choice.error):
                raise UserError(
                    f"the error of {unit.name} at level {choice.level} is {choice.error}: errors must be finite numbers"
                )


def _names(units: Sequence[Unit], place: int) -> str:
    """Names of the levels at one end of the choices (place 0 or -1), of layers and of dropped parts."""
    chosen = [range(len(unit.choices))[place] for unit in units]
    ends = [
        unit.choices[index].level
        for unit, index, out in zip(units, chosen, left_out(units, chosen), strict=True)
        if not out and (unit.layers or unit.choices[index].level == DROP)
    ]
    levels = list(dict.fromkeys(ends)) or [units[0].choices[place].level]
    return "/".join(levels[:3]) + ("/..." if len(levels) > 3 else "")


class Allocator(ABC):
    """A method that spreads a budget of bits over units, from the units' sizes and errors alone.

    A method that measures candidates on the model is a Searcher (search/base.py). Both are members of conf/allocator.
    needs_errors: whether the method reads the errors of the units.
    """

    needs_errors: ClassVar[bool] = True

    def allocate(self, units: Sequence[Unit], budget: int) -> dict[str, str]:
        """Level of every unit, by unit name, of at most `budget` bits; UserError where the budget is out of range."""
        check_budget(units, budget)
        chosen = self.choose(units, budget)
        assert size(units, chosen) <= budget, f"{type(self).__name__} spent more than the budget"
        return {unit.name: unit.choices[index].level for unit, index in zip(units, chosen, strict=True)}

    @abstractmethod
    def choose(self, units: Sequence[Unit], budget: int) -> list[int]:
        """Index of the choice of every unit. The budget is between the smallest and the largest size."""
