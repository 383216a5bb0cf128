"""What a budget counts: bits per weight, bytes of the checkpoint, or predicted time.

Allocators and searches see whole numbers, the cost of every choice and a limit of their sum. A budget's unit makes the
limit from the number that a user gives, and describes costs in the user's unit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from hasten.accel.compression.allocators.base import DROP, Allocator, BudgetTooSmallError, Unit, cost, left_out
from hasten.accel.errors import UserError

GIGABYTE = 10**9
PICOSECONDS = 10**9  # in a millisecond


class BudgetUnit(ABC):
    """The unit of a budget. name: as a budget is measured in. counts_bits: whether the cost of a choice is its bits."""

    name: ClassVar[str]
    counts_bits: ClassVar[bool] = True

    def limit(self, budget: float, units: Sequence[Unit]) -> int:
        """The cost that all units together may have; UserError where the budget is not finite."""
        if not math.isfinite(budget):
            raise UserError(f"budget={budget} is wrong: expected a number of {self.name}")
        # The budget is the decimal number that was written. Its product in floating point may be a bit below an exact
        # level: 4.1 * 63,999,200 is 262,396,719.99999997.
        return self._limit(Fraction(repr(float(budget))), units)

    @abstractmethod
    def _limit(self, budget: Fraction, units: Sequence[Unit]) -> int:
        """See limit."""

    @abstractmethod
    def amount(self, cost: int, units: Sequence[Unit]) -> Fraction:
        """A cost of all units together as a budget."""

    # Rounded inwards, so that the printed bounds are legal budgets.

    def lowest(self, cost: int, units: Sequence[Unit]) -> str:
        """The lowest budget, with four decimals at most, that allows this cost."""
        return f"{-(-self.amount(cost, units) * 10**4 // 1) / 10**4:.12g}"

    def highest(self, cost: int, units: Sequence[Unit]) -> str:
        """The highest budget, with four decimals at most, that is not above this cost."""
        return f"{self.amount(cost, units) * 10**4 // 1 / 10**4:.12g}"


@dataclass(frozen=True)
class BitsPerWeight(BudgetUnit):
    """Average bits of a weight of the units, scales included."""

    name: ClassVar[str] = "bits per weight"

    def _limit(self, budget: Fraction, units: Sequence[Unit]) -> int:
        return int(budget * _weights(units))

    def amount(self, cost: int, units: Sequence[Unit]) -> Fraction:
        """Bits of a weight."""
        return Fraction(cost, _weights(units))


@dataclass(frozen=True)
class Gigabytes(BudgetUnit):
    """10^9 bytes of all tensors of the checkpoint. fixed: bytes of those that are not of the units."""

    fixed: int
    name: ClassVar[str] = "gigabytes"

    def _limit(self, budget: Fraction, units: Sequence[Unit]) -> int:
        return int((budget * GIGABYTE - self.fixed) * 8)

    def amount(self, cost: int, units: Sequence[Unit]) -> Fraction:
        """Gigabytes of the checkpoint."""
        return (Fraction(cost, 8) + self.fixed) / GIGABYTE


@dataclass(frozen=True)
class Milliseconds(BudgetUnit):
    """Predicted milliseconds of a pass; costs are picoseconds. fixed: picoseconds of what no level changes."""

    fixed: int = 0
    name: ClassVar[str] = "milliseconds"
    counts_bits: ClassVar[bool] = False

    def _limit(self, budget: Fraction, units: Sequence[Unit]) -> int:
        return int(budget * PICOSECONDS) - self.fixed

    def amount(self, cost: int, units: Sequence[Unit]) -> Fraction:
        """Milliseconds of a pass."""
        return Fraction(cost + self.fixed, PICOSECONDS)


BITS = BitsPerWeight()


def check_budget(units: Sequence[Unit], limit: int, unit: BudgetUnit = BITS) -> None:
    """UserError, which names the lowest and the highest level, where the limit is below the one or above the other."""
    low = cost(units, [0] * len(units))
    high = cost(units, [len(one.choices) - 1 for one in units])
    if not low <= limit <= high:
        lowest = f"{_names(units, 0)} ({unit.lowest(low, units)} {unit.name})"
        highest = f"{_names(units, -1)} ({unit.highest(high, units)})"
        side = "below the lowest" if limit < low else "above the highest"
        budget = float(unit.amount(limit, units))
        raise UserError(f"budget={budget:.5g} is {side} level: they reach from {lowest} to {highest}")


def check_allocator(counts_bits: bool, name: str, unit: BudgetUnit) -> None:
    """UserError where an allocator spreads nothing but bits, and the budget is of another unit."""
    if counts_bits and not unit.counts_bits:
        raise UserError(f"allocator={name} spreads bits, and the budget is in {unit.name}: use evopress or exact")


def allocate(allocator: Allocator, units: Sequence[Unit], limit: int, unit: BudgetUnit = BITS) -> dict[str, str]:
    """Level of every unit, by unit name, within the limit; UserError where the limit is out of range."""
    check_budget(units, limit, unit)
    try:
        chosen = allocator.choose(units, limit)
    except BudgetTooSmallError as error:
        budget, least = float(unit.amount(limit, units)), unit.lowest(error.least, units)
        raise UserError(f"budget={budget:g} {error.reason}: it takes {least} {unit.name} or more") from None
    assert cost(units, chosen) <= limit, f"{type(allocator).__name__} spent more than the budget"
    return {one.name: one.choices[index].level for one, index in zip(units, chosen, strict=True)}


def _weights(units: Sequence[Unit]) -> int:
    return sum(unit.weights for unit in units)


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
