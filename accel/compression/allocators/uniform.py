"""Uniform: the same level for every unit. The baseline every allocator here is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.compression.allocators.base import DROP, Allocator, BudgetTooSmallError, Unit, cost
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Uniform(Allocator):
    """Allocator that chooses the highest common level that fits the budget; the rest of the budget is not spent.

    Parts that can be dropped are kept.
    """

    needs_errors: ClassVar[bool] = False

    def choose(self, units: Sequence[Unit], budget: int) -> list[int]:
        """Index of the choice of every unit; BudgetTooSmallError where no common level fits."""
        fixed = [_kept_part(unit) for unit in units]
        levels = _common_levels([unit for unit, kept in zip(units, fixed, strict=True) if kept is None])
        candidates = [
            [unit.index(level) if kept is None else kept for unit, kept in zip(units, fixed, strict=True)]
            for level in levels
        ]
        costs = [cost(units, chosen) for chosen in candidates]
        fitting = [place for place, value in enumerate(costs) if value <= budget]
        if not fitting:
            least = min(costs)
            level = levels[costs.index(least)]
            raise BudgetTooSmallError(f"is below {level}, the lowest level that all layers have", least)
        return candidates[max(fitting, key=lambda place: costs[place])]


def _kept_part(unit: Unit) -> int | None:
    """Index of the choice that keeps a part; None for units that are not parts."""
    kept = [index for index, choice in enumerate(unit.choices) if choice.level != DROP]
    return kept[0] if len(kept) == 1 and len(unit.choices) == 2 else None


def _common_levels(units: Sequence[Unit]) -> list[str]:
    """Levels that every unit has; without units, one name that means that all parts are kept."""
    if not units:
        return ["keeping all parts"]
    common = [choice.level for choice in units[0].choices if choice.level != DROP]
    for unit in units:
        own = [choice.level for choice in unit.choices]
        shared = [level for level in common if level in own]
        if not shared:
            raise UserError(
                f"the layers have no level in common: {unit.name} has {', '.join(own)}, those before it share "
                f"{', '.join(common)}"
            )
        common = shared
    return common
