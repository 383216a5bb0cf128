"""What an allocator takes and gives: units that get one level each, and a budget of bits for all of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.errors import UserError

# Level of a part of the model that is left out.
DROP = "drop"
# Kinds of such parts.
ATTENTION, MLP, BLOCK = "attention", "mlp", "block"


@dataclass(frozen=True)
class Choice:
    """One level that a unit may get.

    level: its name. bits: exact size of the whole unit at this level, scales, zero points and masks counted. error:
    what it adds to the model's error, in any measure that adds up over the units.
    """

    level: str
    bits: int
    error: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Layers that get the same level, or a part of a block that can be dropped.

    name: unique; that of the first layer. layers: their names. kind: equal for units that do the same in different
    blocks. weights: 0 for a part whose layers are units themselves. choices: by rising bits, no two of the same level;
    those of a part are `drop`, with the bits of what a file must still hold, and then `keep`, with none of its own.
    part_of: name of the unit whose level `drop` leaves this one out, and with it its bits.
    """

    name: str
    layers: tuple[str, ...]
    block: int
    kind: str
    weights: int
    choices: tuple[Choice, ...]
    part_of: str | None = None

    def index(self, level: str) -> int:
        """Place of a level among the choices; ValueError where it is none of them."""
        return [choice.level for choice in self.choices].index(level)


def left_out(units: Sequence[Unit], chosen: Sequence[int]) -> list[bool]:
    """Of every unit whether it lies in a dropped part, or in a part of one."""
    dropped = {unit.name for unit, index in zip(units, chosen, strict=True) if unit.choices[index].level == DROP}
    if not dropped:
        return [False] * len(units)
    outer = {unit.name: unit.part_of for unit in units}

    def is_gone(part: str | None) -> bool:
        while part is not None and part not in dropped:
            part = outer[part]
        return part is not None

    return [is_gone(unit.part_of) for unit in units]


def size(units: Sequence[Unit], chosen: Sequence[int]) -> int:
    """Bits of all units with these choices; what lies in a dropped part counts nothing."""
    gone = left_out(units, chosen)
    return sum(unit.choices[index].bits for unit, index, out in zip(units, chosen, gone, strict=True) if not out)


def error(units: Sequence[Unit], chosen: Sequence[int]) -> float:
    """Sum of the choices' errors; what lies in a dropped part adds nothing to the error of dropping it."""
    gone = left_out(units, chosen)
    return math.fsum(unit.choices[index].error for unit, index, out in zip(units, chosen, gone, strict=True) if not out)


def check_budget(units: Sequence[Unit], budget: int) -> None:
    """UserError that names the lowest and the highest level where no choice of levels makes sense for the budget."""
    weights = sum(unit.weights for unit in units)
    low = size(units, [0] * len(units))
    high = size(units, [len(unit.choices) - 1 for unit in units])
    if not low <= budget <= high:
        # Rounded inwards, so that a bound is a legal budget as it is printed.
        lowest = f"{_names(units, 0)} ({math.ceil(low / weights * 1e4) / 1e4:g} bits per weight)"
        highest = f"{_names(units, -1)} ({math.floor(high / weights * 1e4) / 1e4:g})"
        side = "below the lowest" if budget < low else "above the highest"
        raise UserError(f"budget={budget / weights:.5g} is {side} level: they reach from {lowest} to {highest}")


def check_errors(units: Sequence[Unit]) -> None:
    """UserError that names a level whose error is not a finite number."""
    for unit in units:
        for choice in unit.choices:
            if not math.isfinite(choice.error):
                raise UserError(
                    f"the error of {unit.name} at level {choice.level} is {choice.error}: errors must be finite numbers"
                )


def _names(units: Sequence[Unit], place: int) -> str:
    """Names of the levels at one end of the choices, of layers and of what is dropped."""
    chosen = [range(len(unit.choices))[place] for unit in units]
    ends = [
        unit.choices[index].level
        for unit, index, out in zip(units, chosen, left_out(units, chosen), strict=True)
        if not out and (unit.layers or unit.choices[index].level == DROP)
    ]
    levels = list(dict.fromkeys(ends)) or [units[0].choices[place].level]
    return "/".join(levels[:3]) + ("/..." if len(levels) > 3 else "")


class Allocator(ABC):
    """A way to compute from the units alone how a budget of bits is spread over them; never spends more.

    What has to measure candidates on the model for that is a Searcher (search/base.py). Both are members of
    conf/allocator. needs_errors: it reads the errors of the units.
    """

    needs_errors: ClassVar[bool] = True

    def allocate(self, units: Sequence[Unit], budget: int) -> dict[str, str]:
        """Level of every unit, by name, of `budget` bits or less; UserError where the budget is out of reach."""
        check_budget(units, budget)
        chosen = self.choose(units, budget)
        assert size(units, chosen) <= budget, f"{type(self).__name__} spent more than the budget"
        return {unit.name: unit.choices[index].level for unit, index in zip(units, chosen, strict=True)}

    @abstractmethod
    def choose(self, units: Sequence[Unit], budget: int) -> list[int]:
        """Index of the choice of every unit; the budget lies between the smallest and the largest size."""
