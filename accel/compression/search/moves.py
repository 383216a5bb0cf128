"""Moves of a search between assignments of levels to units: level switches, and drops of parts.

Source: Sieberling et al. 2024, arXiv:2410.14649 (EvoPress) for level switches and swaps of dropped parts. Moves between
units of different sizes, and between drops and levels, are ours; see mutation.py.
"""

from collections.abc import Sequence

import numpy as np

from hasten.accel.compression.allocators.base import DROP, Unit, cost, left_out
from hasten.accel.errors import UserError

# Index of the choice of every unit.
Genome = tuple[int, ...]

# Attempts per requested genome. Fewer genomes may come out, because small problems run out of new ones.
TRIES = 20


class Space:
    """Units and a budget, with the structure that moves use: units of equal costs, and parts to drop.

    Units are referred to by their index. costs: for every unit those of its choices. groups: sets of units with the
    same costs at every choice; units with one choice, and parts that can be dropped, are in no group. group: group of
    each such unit. alone: share of the grouped units whose group has one unit, 0 to 1. parts: for every part that can
    be dropped, the indices of `drop` and of its other choice. inside: for every part, all units that are dropped with
    it.
    Raises ValueError for a part that does not have exactly these two choices.
    """

    def __init__(self, units: Sequence[Unit], budget: int) -> None:
        self.units = tuple(units)
        self.budget = budget
        self.costs = [[choice.cost for choice in unit.choices] for unit in units]
        place = {unit.name: index for index, unit in enumerate(units)}
        holders = {unit.part_of for unit in units} - {None}
        self.parts: dict[int, tuple[int, int]] = {}
        for index, unit in enumerate(units):
            levels = [choice.level for choice in unit.choices]
            if unit.name in holders or (DROP in levels and len(levels) == 2):
                if DROP not in levels or len(levels) != 2:
                    raise ValueError(
                        f"{unit.name} holds other units: its levels must be {DROP} and one more, not {levels}"
                    )
                self.parts[index] = (levels.index(DROP), 1 - levels.index(DROP))
        self.inside: dict[int, list[int]] = {part: [] for part in self.parts}
        for index, unit in enumerate(units):
            name = unit.part_of
            while name is not None:
                self.inside[place[name]].append(index)
                name = units[place[name]].part_of
        of_equal_costs: dict[tuple[int, ...], list[int]] = {}
        for index, costs in enumerate(self.costs):
            if index not in self.parts and len(costs) > 1:
                of_equal_costs.setdefault(tuple(costs), []).append(index)
        self.groups = list(of_equal_costs.values())
        self.group = {index: group for group in self.groups for index in group}
        self.alone = sum(len(group) == 1 for group in self.groups) / max(len(self.group), 1)

    def check(self, name: str, genome: Sequence[int]) -> Genome:
        """The genome in normal form (see MutableGenome.settle); UserError, which names it, where it is not valid."""
        fits = len(genome) == len(self.units) and all(
            0 <= choice < len(costs) for choice, costs in zip(genome, self.costs, strict=True)
        )
        if not fits:
            raise UserError(f"{name} holds {len(genome)} choices that are not those of these {len(self.units)} units")
        if cost(self.units, genome) > self.budget:
            raise UserError(f"{name} costs {cost(self.units, genome)}: the budget is {self.budget}")
        return tuple(MutableGenome(self, [int(choice) for choice in genome]).genome)

    def first(self, count: int, rng: np.random.Generator) -> list[Genome]:
        """The genome of a single level with exactly the budget's cost, or else up to `count` random genomes.

        The random ones are lowered from the smallest genome of a single level above the budget.
        """
        uniform = self._uniform()
        exact = [genome for genome in uniform if cost(self.units, genome) == self.budget]
        if exact:
            return exact[:1]
        too_large = [(cost(self.units, genome), genome) for genome in uniform]
        above = min(entry for entry in too_large if entry[0] > self.budget)[1]
        made: dict[Genome, None] = {}
        for _ in range(TRIES * count):
            genome = MutableGenome(self, above)
            genome.descend(rng)
            made[tuple(genome.genome)] = None
            if len(made) == count:
                break
        return list(made)

    def _uniform(self) -> list[Genome]:
        """Genomes without drops and with all units at one level, for all common levels; the last has the highest."""
        kept = {part: keep for part, (_, keep) in self.parts.items()}
        inner = [unit for index, unit in enumerate(self.units) if index not in self.parts]
        known = [{choice.level for choice in unit.choices} for unit in inner]
        common = [choice.level for choice in inner[0].choices] if inner else []
        genomes = [
            tuple(kept[index] if index in kept else unit.index(level) for index, unit in enumerate(self.units))
            for level in common
            if all(level in levels for levels in known)
        ]
        highest = (kept.get(index, len(costs) - 1) for index, costs in enumerate(self.costs))
        return [*genomes, tuple(highest)]


class MutableGenome:
    """A genome that moves change in place; it may be over the budget between moves.

    genome: the current choices. size: their cost. live: for every unit whether it is outside all dropped parts. Random
    numbers come only from the given generator, so that equal generators give equal genomes.
    """

    def __init__(self, space: Space, genome: Sequence[int]) -> None:
        self.space = space
        self.genome = list(genome)
        self.settle()

    def settle(self) -> None:
        """Update size and live after a change of parts, and bring the genome into normal form.

        Units in dropped parts get their first choice, parts in them `drop`, so that equal models have equal genomes.
        """
        space = self.space
        self.live = [not out for out in left_out(space.units, self.genome)]
        for unit, live in enumerate(self.live):
            if not live:
                self.genome[unit] = space.parts[unit][0] if unit in space.parts else 0
        self.size = sum(
            costs[choice] for costs, choice, live in zip(space.costs, self.genome, self.live, strict=True) if live
        )

    def cost(self, unit: int, step: int) -> int:
        """Cost that a step of a unit, one level up (1) or down (-1), adds."""
        costs, choice = self.space.costs[unit], self.genome[unit]
        return costs[choice + step] - costs[choice]

    def move(self, unit: int, step: int) -> None:
        """Move a unit one level up (1) or down (-1)."""
        self.size += self.cost(unit, step)
        self.genome[unit] += step

    def movable(self, step: int, units: Sequence[int] | None = None) -> list[int]:
        """Units that can go one level up (1) or down (-1), out of the given ones, or out of all that have levels."""
        live, genome, costs = self.live, self.genome, self.space.costs
        among = self.space.group if units is None else units
        return [unit for unit in among if live[unit] and 0 <= genome[unit] + step < len(costs[unit])]

    def switch(self, count: int, rng: np.random.Generator) -> None:
        """Level switches within groups: one unit goes down and another of its group up, within the budget."""
        for _ in range(count):
            units = [unit for unit in self.space.group if self.live[unit]]
            if not units:
                return
            group = self.space.group[_pick(units, rng)]  # of a random unit, so that large groups are drawn more often
            for down in rng.permutation(self.movable(-1, group)).tolist():
                room = self.space.budget - self.size - self.cost(down, -1)
                ups = [up for up in self.movable(1, group) if up != down and self.cost(up, 1) <= room]
                if ups:
                    self.move(down, -1)
                    self.move(_pick(ups, rng), 1)
                    break

    def shift(self, count: int, rng: np.random.Generator) -> bool:
        """Raise `count` random units and lower others until the budget holds; False where it cannot hold."""
        raised = set()
        for _ in range(count):
            ups = self.movable(1)
            if ups:
                unit = _pick(ups, rng)
                self.move(unit, 1)
                raised.add(unit)
        return self.lower(rng, raised)

    def lower(self, rng: np.random.Generator, spared: set[int]) -> bool:
        """Lower random units, except the spared ones, until the budget holds; False where it cannot hold."""
        while self.size > self.space.budget:
            downs = [unit for unit in self.movable(-1) if unit not in spared]
            if not downs:
                return False
            self.move(_pick(downs, rng), -1)
        return True

    def spend(self, rng: np.random.Generator) -> None:
        """Raise random units as long as the budget holds."""
        while True:
            ups = [unit for unit in self.movable(1) if self.size + self.cost(unit, 1) <= self.space.budget]
            if not ups:
                return
            self.move(_pick(ups, rng), 1)

    def descend(self, rng: np.random.Generator) -> None:
        """Lower random units until the budget holds; where that is not enough, drop random parts, too."""
        if not self.lower(rng, set()):
            while self.size > self.space.budget:
                self.drop(_pick(self.kept(), rng))
        # The last dropped part may have been larger than necessary.
        for part in rng.permutation(self.dropped()).tolist():
            genome = list(self.genome)
            self.restore(part)
            if self.size > self.space.budget:
                self.genome = genome
                self.settle()
        self.spend(rng)

    def kept(self) -> list[int]:
        """Kept parts, which can be dropped."""
        return [part for part, (drop, _) in self.space.parts.items() if self.live[part] and self.genome[part] != drop]

    def dropped(self) -> list[int]:
        """Dropped parts, which can be restored."""
        return [part for part, (drop, _) in self.space.parts.items() if self.live[part] and self.genome[part] == drop]

    def drop(self, part: int) -> None:
        """Drop a part."""
        self.genome[part] = self.space.parts[part][0]
        self.settle()

    def restore(self, part: int, like: Sequence[int] = ()) -> None:
        """Restore a part with everything inside. like: choices of the units inside; empty: their first choices."""
        self.genome[part] = self.space.parts[part][1]
        for place, unit in enumerate(self.space.inside[part]):
            if unit in self.space.parts:
                self.genome[unit] = self.space.parts[unit][1]
            if place < len(like):
                self.genome[unit] = min(like[place], len(self.space.costs[unit]) - 1)
        self.settle()

    def swappable(self) -> list[int]:
        """Dropped parts for which there is a kept part of the same kind."""
        kinds = {self.space.units[part].kind for part in self.kept()}
        return [part for part in self.dropped() if self.space.units[part].kind in kinds]

    def swap(self, count: int, rng: np.random.Generator) -> None:
        """Restore a dropped part and drop another of its kind, whose levels it takes over; `count` times."""
        for _ in range(count):
            options = self.swappable()
            if not options:
                return
            restored = _pick(options, rng)
            kind = self.space.units[restored].kind
            replaced = _pick([part for part in self.kept() if self.space.units[part].kind == kind], rng)
            levels = [self.genome[unit] for unit in self.space.inside[replaced]]
            self.drop(replaced)
            self.restore(restored, levels)

    def trade(self, rng: np.random.Generator) -> None:
        """Drop a part, which frees budget for levels, or restore one, whose cost levels must then give up."""
        kept, dropped = self.kept(), self.dropped()
        if dropped and (not kept or rng.random() < 0.5):
            self.restore(_pick(dropped, rng))
        elif kept:
            self.drop(_pick(kept, rng))


def _pick(options: Sequence[int], rng: np.random.Generator) -> int:
    return options[int(rng.integers(len(options)))]
