"""Exact: the levels of provably least total error within the budget.

Source: the multiple-choice knapsack problem, Sinha and Zoltners 1979, doi:10.1287/opre.27.3.503; solved as in Pisinger
1995, doi:10.1016/0377-2217(95)00015-I: a Lagrangian bound decides most units, and dynamic programming the few others.
Departs from it: units may lie in parts that can be dropped, so both the bound and the states are computed over trees.
A solver of mixed-integer programs is not used: its tolerance, a millionth of a choice, is many bits of a large model.
Costs are integers throughout, and of two solutions with the same error the one that costs less is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hasten.accel.compression.allocators.base import DROP, Allocator, Unit, check_errors, cost, error
from hasten.accel.errors import UserError

_Ints: TypeAlias = NDArray[np.int64]
_Floats: TypeAlias = NDArray[np.float64]

# Relative tolerance for rounding errors where a state is pruned because its bound is worse than a known solution.
_ROUNDING = 1e-13
# Limit of the bisection of the price: a price close to 0 would never meet the relative tolerance.
_HALVINGS = 500


@dataclass(frozen=True)
class Exact(Allocator):
    """Allocator that finds the optimum of errors that are additive over units.

    max_states: partial solutions held at a time; each takes 32 bytes for every unit that the bound does not decide.
    Layers of a model need hundreds; the limit is for artificial instances, some of which cannot be solved at all.
    """

    max_states: int = 1_048_576

    def choose(self, units: Sequence[Unit], budget: int) -> list[int]:
        """Index of the choice of every unit; UserError where max_states is too small."""
        check_errors(units)
        problem = _Problem(units, budget)
        price, known = problem.relax()
        if price == 0:
            return known
        known = problem.improve(known)
        return _Search(problem, price, error(units, known), self.max_states).solve()


class _Problem:
    """Units as arrays over all choices, unit after unit, and the Lagrangian relaxation, where the budget has a price.

    starts: first choice of every unit. owner: unit of every choice. holds: whether a choice is not `drop`. outer: unit
    that contains a unit, or -1; inner: its inverse. depth: number of units around a unit.
    """

    def __init__(self, units: Sequence[Unit], budget: int) -> None:
        self.units, self.budget = units, budget
        counts = [len(unit.choices) for unit in units]
        self.starts = np.cumsum([0, *counts[:-1]])
        self.owner = np.repeat(np.arange(len(units)), counts)
        choices = [choice for unit in units for choice in unit.choices]
        self.spent = np.array([choice.cost for choice in choices], dtype=np.int64)
        self.errors = np.array([choice.error for choice in choices])
        self.holds = np.array([choice.level != DROP for choice in choices])
        place = {unit.name: index for index, unit in enumerate(units)}
        self.outer = np.array([-1 if unit.part_of is None else place[unit.part_of] for unit in units])
        self.depth = np.zeros(len(units), dtype=np.int64)
        above = self.outer.copy()
        while (above >= 0).any():
            self.depth += above >= 0
            above = np.where(above >= 0, self.outer[above], -1)
        self.inner: dict[int, list[int]] = {}
        for index, outer in enumerate(self.outer.tolist()):
            self.inner.setdefault(outer, []).append(index)

    def costs(self, price: float) -> tuple[_Floats, _Floats]:
        """Least error plus price times cost, of every choice with all units inside, and of every unit."""
        costs = self.errors + price * self.spent
        for depth in range(self.depth.max(initial=0), 0, -1):
            least = np.minimum.reduceat(costs, self.starts)
            inside = np.zeros(len(self.units))
            members = self.depth == depth
            np.add.at(inside, self.outer[members], least[members])
            costs = costs + inside[self.owner] * self.holds
        return costs, np.minimum.reduceat(costs, self.starts)

    def cheapest(self, price: float) -> tuple[_Ints, int]:
        """Cheapest choice of every unit at this price, as an index into the arrays, and the cost of all."""
        costs, least = self.costs(price)
        places = np.where(costs == least[self.owner], np.arange(len(costs)), len(costs))
        chosen = np.minimum.reduceat(places, self.starts)
        alive = self.alive(chosen)
        return np.where(alive, chosen, self.starts), int(self.spent[chosen[alive]].sum())

    def alive(self, chosen: _Ints) -> NDArray[np.bool_]:
        """Whether each unit is outside all dropped parts."""
        alive = np.ones(len(self.units), dtype=bool)
        for depth in range(1, self.depth.max(initial=0) + 1):
            members = self.depth == depth
            outer = self.outer[members]
            alive[members] = alive[outer] & self.holds[chosen[outer]]
        return alive

    def relax(self) -> tuple[float, list[int]]:
        """The least price of the budget, in error, at which the cheapest choices fit it; and these choices."""
        chosen, spent = self.cheapest(0.0)
        if spent <= self.budget:
            return 0.0, (chosen - self.starts).tolist()
        # At this price a unit of the budget costs more than any error.
        low, high = 0.0, float(np.abs(self.errors).max()) * 4 * len(self.units)
        chosen, _ = self.cheapest(high)
        for _ in range(_HALVINGS):
            if high - low <= 1e-14 * high:
                break
            middle = (low + high) / 2
            tried, spent = self.cheapest(middle)
            if spent <= self.budget:
                high, chosen = middle, tried
            else:
                low = middle
        return high, (chosen - self.starts).tolist()

    def improve(self, chosen: list[int]) -> list[int]:
        """Spend the rest of the budget greedily: each step changes the unit whose change lowers the error most."""
        now = np.array(chosen) + self.starts
        # Only units outside dropped parts are changed, and none is dropped.
        open_ = self.alive(now)[self.owner] & self.holds & self.holds[now][self.owner]
        remaining = self.budget - cost(self.units, chosen)
        while True:
            added = self.spent - self.spent[now][self.owner]
            gain = np.where(open_ & (added <= remaining), self.errors[now][self.owner] - self.errors, 0.0)
            best = int(gain.argmax())
            if gain[best] <= 0:
                return (now - self.starts).tolist()
            remaining -= int(added[best])
            now[self.owner[best]] = best


@dataclass(frozen=True)
class _States:
    """Partial solutions of some units: spent (S,) int64, their costs, ascending, and errors (S,), descending.

    bound: contribution of these units to the bound. State s combines state first[s] of `rest` and state second[s] of
    `more`. Where `unit` is set, state s combines choice first[s] of this unit and state second[s] of `more`, the units
    inside it, if there are any.
    """

    spent: _Ints
    errors: _Floats
    bound: float
    first: _Ints
    second: _Ints
    rest: "_States | None" = None
    more: "_States | None" = None
    unit: int | None = None


class _Search:
    """Dynamic programming over units that prunes states whose bound is above the error of a known solution."""

    def __init__(self, problem: _Problem, price: float, known: float, max_states: int) -> None:
        self.problem, self.price, self.max_states = problem, price, max_states
        self.costs, least = problem.costs(price)
        self.least = least.tolist()
        roots = problem.inner[-1]
        gap = known - (math.fsum(self.least[root] for root in roots) - price * problem.budget)
        scale = float(np.abs(problem.errors).max()) + price * problem.budget + math.fsum(map(abs, self.least))
        self.gap = max(gap, 0.0) + _ROUNDING * scale

    def solve(self) -> list[int]:
        """Index of the choice of every unit."""
        problem, chosen = self.problem, [0] * len(self.problem.units)
        remaining, open_ = problem.budget, []
        for states in map(self._unit, problem.inner[-1]):
            if len(states.spent) == 1:
                self._trace(states, 0, chosen)
                remaining -= int(states.spent[0])
            else:
                open_.append(states)
        # Units with large steps first: states of the small ones coincide more often, and are pruned.
        open_.sort(key=lambda states: int(states.spent[0]) - int(states.spent[-1]))
        needed = sum(int(states.spent[0]) for states in open_)
        total = self._nothing()
        for states in open_:
            needed -= int(states.spent[0])
            total = self._join(total, states, remaining - needed)
        self._trace(total, len(total.spent) - 1, chosen)
        return chosen

    def _nothing(self) -> _States:
        zero = np.zeros(1, dtype=np.int64)
        return _States(zero, np.zeros(1), 0.0, zero, zero)

    def _unit(self, unit: int) -> _States:
        """States of a unit together with all units inside it."""
        problem = self.problem
        start = int(problem.starts[unit])
        costs = self.costs[start : start + len(problem.units[unit].choices)]
        places = start + np.flatnonzero(costs - self.least[unit] <= self.gap)
        inside = None
        if unit in problem.inner and bool(problem.holds[places].any()):
            inside = self._nothing()
            for states in map(self._unit, problem.inner[unit]):
                inside = self._join(inside, states, problem.budget)
        spent, errors, first, second = [], [], [], []
        for place in places.tolist():
            held = inside if inside is not None and problem.holds[place] else self._nothing()
            spent.append(problem.spent[place] + held.spent)
            errors.append(problem.errors[place] + held.errors)
            first.append(np.full(len(held.spent), place - start))
            second.append(np.arange(len(held.spent)))
        joined = np.concatenate(spent), np.concatenate(errors)
        kept = self._prune(*joined, self.least[unit], problem.budget)
        sources = np.concatenate(first)[kept], np.concatenate(second)[kept]
        return _States(joined[0][kept], joined[1][kept], self.least[unit], *sources, more=inside, unit=unit)

    def _join(self, rest: _States, more: _States, max_spent: int) -> _States:
        """Combinations of both, of at most max_spent."""
        width = len(more.spent)
        if len(rest.spent) * width > 8 * self.max_states:
            self._refuse()
        spent, errors = np.add.outer(rest.spent, more.spent).ravel(), np.add.outer(rest.errors, more.errors).ravel()
        bound = rest.bound + more.bound
        kept = self._prune(spent, errors, bound, max_spent)
        return _States(spent[kept], errors[kept], bound, kept // width, kept % width, rest, more)

    def _prune(self, spent: _Ints, errors: _Floats, bound: float, max_spent: int) -> _Ints:
        """Indices of the states that may be part of the optimum, by ascending cost and strictly descending error."""
        kept = np.flatnonzero((errors + self.price * spent - bound <= self.gap) & (spent <= max_spent))
        kept = kept[np.lexsort((errors[kept], spent[kept]))]
        best = np.minimum.accumulate(errors[kept])
        kept = kept[np.append(True, errors[kept][1:] < best[:-1])] if len(kept) else kept
        if len(kept) > self.max_states:
            self._refuse()
        return kept

    def _refuse(self) -> None:
        raise UserError(
            f"max_states={self.max_states} is too few for these {len(self.problem.units)} units: "
            f"raise it, group the layers or take another allocator"
        )

    def _trace(self, states: _States | None, index: int, chosen: list[int]) -> None:
        """Write the choices that make up a state into `chosen`."""
        while states is not None:
            first, second = int(states.first[index]), int(states.second[index])
            if states.unit is not None:
                chosen[states.unit] = first
                if self.problem.units[states.unit].choices[first].level == DROP:
                    return
                states, index = states.more, second
            else:
                self._trace(states.more, second, chosen)
                states, index = states.rest, first
