"""BAQ: bits by water-filling, so that one more bit would lower the error of every layer, or column, by the same.

Source: Chao Zhang et al. 2025, arXiv:2506.05664. Its model: at b bits per weight the error is c 2^(-2b).
Departs from it: levels are those that a file can hold, bits are exact, and the budget is never exceeded. The
real-valued bits are rounded down to levels, and the remaining bits are spent one step at a time on the unit whose
modelled error falls most per bit. Between steps of equal width that is the unit that was rounded down most (the gain
per bit is a constant times 4^cut); the rule also holds where steps are uneven or a unit is at a bound. The same method
spreads bits over layers and over the columns of a layer.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.allocators.base import DROP, Allocator, BudgetTooSmallError, Unit, check_errors
from hasten.accel.errors import UserError

# Replaces the binary logarithm of 0: smaller than that of any positive float64.
_LOG2_OF_ZERO = -1100.0


@dataclass(frozen=True)
class BAQ(Allocator):
    """Allocator in closed form, from one number a unit: c in error = c 2^(-2 bits per weight).

    reference: level whose error determines c; None fits c to the errors of all levels with an error above 0. Parts that
    can be dropped are kept.
    """

    reference: str | None = None

    counts_bits: ClassVar[bool] = True

    def choose(self, units: Sequence[Unit], budget: int) -> list[int]:
        """Index of the choice of every unit; BudgetTooSmallError where the budget needs a part dropped."""
        check_errors(units)
        options = [_options(unit) for unit in units]
        min_bits = sum(unit.choices[own[0]].bits for unit, own in zip(units, options, strict=True))
        if min_bits > budget:
            raise BudgetTooSmallError("needs parts to be dropped, which BAQ does not", min_bits)
        constants = [
            self.log2_constant(unit) if len(own) > 1 else _LOG2_OF_ZERO
            for unit, own in zip(units, options, strict=True)
        ]
        chosen = _round_down(units, options, constants, budget)
        _spend(units, options, constants, chosen, budget)
        return [own[place] for own, place in zip(options, chosen, strict=True)]

    def log2_constant(self, unit: Unit) -> float:
        """Binary logarithm of c; -1100 where no level has an error."""
        choices = [choice for choice in unit.choices if choice.level != DROP]
        if self.reference is not None:
            levels = [choice.level for choice in choices]
            if self.reference not in levels:
                raise UserError(f"reference={self.reference!r} is no level of {unit.name}: it has {', '.join(levels)}")
            choices = [choices[levels.index(self.reference)]]
        logs = [
            math.log2(choice.error) + 2 * choice.bits / max(unit.weights, 1) for choice in choices if choice.error > 0
        ]
        return sum(logs) / len(logs) if logs else _LOG2_OF_ZERO


def water_fill(wishes: Tensor, weights: Tensor, lowest: Tensor, highest: Tensor, budget: float) -> Tensor:
    """Bits per weight R (L,), float64, with sum weights R = budget.

    R = clamp(wish + constant, lowest, highest), all (L,) float64. This minimises the sum of c 2^(-2R) where a wish is
    log2(c / weights) / 2. Where the budget is out of range, all of R is lowest, or all of it highest.
    """
    rates, free, remaining = torch.empty_like(wishes), torch.ones_like(wishes, dtype=torch.bool), float(budget)
    while bool(free.any()):
        constant = (remaining - (weights * wishes)[free].sum()) / weights[free].sum()
        unclamped = wishes + constant
        clamped = unclamped.clamp(lowest, highest)
        # Raising units to their lowest level takes bits from the rest, so units clamped at the highest level may leave
        # it later, and the other way round. So only the side with the larger excess is final.
        excess = float((weights * (clamped - unclamped))[free].sum())
        pinned = free & ((unclamped < lowest) if excess > 0 else (unclamped > highest))
        if excess == 0 or not bool(pinned.any()):
            pinned = free
        rates[pinned] = clamped[pinned]
        remaining -= float((weights * clamped)[pinned].sum())
        free = free & ~pinned
    return rates


def column_bits(losses: Tensor, mean_bits: float, lowest: int, highest: int) -> Tensor:
    """Bits of each column, (C,) int64 between lowest and highest, for losses (C,) at equal bits.

    Closed form: mean_bits + log2(loss / geometric mean of the losses) / 2, clamped, and rounded to a total of
    round(mean_bits C). UserError where mean_bits is not between lowest and highest.
    """
    if not lowest <= mean_bits <= highest:
        raise UserError(f"mean_bits={mean_bits:g} is out of range: {lowest} to {highest}")
    total = round(mean_bits * len(losses))
    wishes = losses.double().log2().clamp(min=_LOG2_OF_ZERO) / 2
    bounds = torch.full_like(wishes, lowest), torch.full_like(wishes, highest)
    rates = water_fill(wishes, torch.ones_like(wishes), *bounds, total)
    bits = rates.floor().long()
    # Steps are equal, so the gain is greatest where rounding down cut most. Columns at the highest bits are not raised.
    cut = (rates - bits).masked_fill(bits >= highest, -1.0)
    bits[cut.sort(descending=True, stable=True).indices[: max(0, total - int(bits.sum()))]] += 1
    return bits


def _options(unit: Unit) -> list[int]:
    """Indices of the Pareto-optimal choices, by rising bits and falling error; `drop` is not among them."""
    kept: list[int] = []
    for index, choice in enumerate(unit.choices):
        if choice.level == DROP or (kept and choice.error >= unit.choices[kept[-1]].error):
            continue
        if kept and choice.bits == unit.choices[kept[-1]].bits:
            kept.pop()
        kept.append(index)
    return kept


def _round_down(
    units: Sequence[Unit], options: Sequence[Sequence[int]], constants: Sequence[float], budget: int
) -> list[int]:
    """Index among each unit's options of the highest level within the real-valued bits per weight."""
    chosen = [0] * len(units)
    # A part that is kept has no weights of its own, and no bits to spread.
    free = [place for place, own in enumerate(options) if len(own) > 1 and units[place].weights]
    if not free:
        return chosen
    sizes = [[unit.choices[index].bits for index in own] for unit, own in zip(units, options, strict=True)]
    rates = [[bits / units[place].weights for bits in sizes[place]] for place in free]
    weights = torch.tensor([units[place].weights for place in free], dtype=torch.float64)
    wishes = (torch.tensor([constants[place] for place in free], dtype=torch.float64) - weights.log2()) / 2
    lowest, highest = torch.tensor([(own[0], own[-1]) for own in rates], dtype=torch.float64).unbind(1)
    # Without the bits of the units that have no choice.
    free_budget = budget - sum(own[0] for own in sizes) + sum(sizes[place][0] for place in free)
    spread = water_fill(wishes, weights, lowest, highest, free_budget).tolist()
    for place, own, rate in zip(free, rates, spread, strict=True):
        chosen[place] = max(0, sum(option <= rate for option in own) - 1)
    return chosen


def _spend(
    units: Sequence[Unit],
    options: Sequence[Sequence[int]],
    constants: Sequence[float],
    chosen: list[int],
    budget: int,
) -> None:
    """Raise `chosen`, indices among the options, by the greatest modelled gain per bit as long as a step fits."""
    sizes = [[unit.choices[index].bits for index in own] for unit, own in zip(units, options, strict=True)]
    remaining = budget - sum(own[place] for own, place in zip(sizes, chosen, strict=True))

    def step(unit: int) -> tuple[float, int] | None:
        """Negative logarithm of the gain per bit of the unit's next level; the gain may be too small for a float."""
        place = chosen[unit]
        if place + 1 == len(sizes[unit]):
            return None
        now, after = sizes[unit][place], sizes[unit][place + 1]
        weights = max(units[unit].weights, 1)
        gain = constants[unit] - 2 * now / weights + math.log2(-math.expm1(2 * math.log(2) * (now - after) / weights))
        return math.log2(after - now) - gain, unit

    heap = [entry for entry in map(step, range(len(units))) if entry is not None]
    heapq.heapify(heap)
    while heap:
        _, unit = heapq.heappop(heap)
        cost = sizes[unit][chosen[unit] + 1] - sizes[unit][chosen[unit]]
        # The remaining bits only shrink: a step that does not fit now never will.
        if cost <= remaining:
            remaining, chosen[unit] = remaining - cost, chosen[unit] + 1
            entry = step(unit)
            if entry is not None:
                heapq.heappush(heap, entry)
