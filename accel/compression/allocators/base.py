"""Base class of allocators, which choose a level for every unit within a budget, and the units themselves."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
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
    its contribution to the model's error, in any measure that is additive over units. cost: what the level takes of the
    budget, in the unit of the budget (see budgets.py); by default its bits.
    """

    level: str
    bits: int
    error: float = 0.0
    cost: int = -1

    def __post_init__(self) -> None:
        if self.cost < 0:
            object.__setattr__(self, "cost", self.bits)


@dataclass(frozen=True)
class Unit:
    """Layers that get the same level, or a part of a block that can be dropped.

    name: unique; the name of the first layer. layers: names of the layers. kind: equal for corresponding units of
    different blocks. weights: number of weights; 0 for a part, whose layers are units themselves. choices: by ascending
    cost, with distinct levels. A part has the choices `drop`, with the bits that a file must still hold, and `keep`,
    with 0 bits. part_of: name of the part that contains this unit; None where no part does. If it is dropped, the bits
    and the cost of this unit do not count.
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
    return sum(choice.bits for choice in _counted(units, chosen))


def cost(units: Sequence[Unit], chosen: Sequence[int]) -> int:
    """Cost of all units at these choices, in the unit of the budget; units in dropped parts do not count."""
    return sum(choice.cost for choice in _counted(units, chosen))


def _counted(units: Sequence[Unit], chosen: Sequence[int]) -> list[Choice]:
    """The choices of the units that are not in dropped parts."""
    omitted = left_out(units, chosen)
    return [unit.choices[index] for unit, index, out in zip(units, chosen, omitted, strict=True) if not out]


def error(units: Sequence[Unit], chosen: Sequence[int]) -> float:
    """Sum of the choices' errors; units in dropped parts do not add to the error of dropping the part."""
    return math.fsum(choice.error for choice in _counted(units, chosen))


def check_errors(units: Sequence[Unit]) -> None:
    """UserError, which names the level, where an error is not a finite number."""
    for unit in units:
        for choice in unit.choices:
            if not math.isfinite(choice.error):
                raise UserError(
                    f"the error of {unit.name} at level {choice.level} is {choice.error}: errors must be finite numbers"
                )


class BudgetTooSmallError(Exception):
    """An allocator cannot keep a budget that others can. reason: of the allocator. least: cost of what it could do."""

    def __init__(self, reason: str, least: int) -> None:
        super().__init__(reason)
        self.reason, self.least = reason, least


class Allocator(ABC):
    """A method that spreads a budget over units, from the units' costs and errors alone.

    A method that measures candidates on the model is a Searcher (search/base.py). Both are members of conf/allocator.
    needs_errors: whether the method reads the errors of the units. counts_bits: whether it takes the cost of a level
    for its bits, and so cannot spread a budget of anything else.
    """

    needs_errors: ClassVar[bool] = True
    counts_bits: ClassVar[bool] = False

    @abstractmethod
    def choose(self, units: Sequence[Unit], budget: int) -> list[int]:
        """Index of the choice of every unit, of at most `budget` cost.

        The budget is between the costs of the first and of the last choices. BudgetTooSmallError where the method
        cannot keep it.
        """
