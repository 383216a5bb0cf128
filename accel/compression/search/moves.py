"""Moves of a search through the assignments of levels to units: switches of levels, and drops of parts.

Source: Sieberling et al. 2024, arXiv:2410.14649 (EvoPress), whose level switches and whose swaps of dropped parts these
are; moves between units of different sizes and between drops and levels are ours, see mutation.py.
"""

from collections.abc import Sequence

import numpy as np

from hasten.accel.compression.allocators.base import DROP, Unit, left_out, size
from hasten.accel.errors import UserError

# Index of the choice of every unit.
Genome = tuple[int, ...]

# Attempts at a new genome, per genome that is wanted. After them there are fewer: small problems run out of genomes.
TRIES = 20


class Space:
    """Units and a budget of bits as the moves see them: what can be switched with what, and what can be dropped.

    All units are named by their place. bits: of every unit, those of its choices. groups: lists of the units that have
    the same bits at every choice, of those with more than one choice; parts that can be dropped are in none. group:
    that of each such unit. alone: share of the grouped units that have no equal, 0 to 1. parts: of every part that can
    be dropped, the places of `drop` and of its other choice. inside: of every part, all that is left out with it.
    Raises ValueError for a part that has other choices than these two.
    """

    def __init__(self, units: Sequence[Unit], budget: int) -> None:
        self.units = tuple(units)
        self.budget = budget
        self.bits = [[choice.bits for choice in unit.choices] for unit in units]
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
        equals: dict[tuple[int, ...], list[int]] = {}
        for index, bits in enumerate(self.bits):
            if index not in self.parts and len(bits) > 1:
                equals.setdefault(tuple(bits), []).append(index)
        self.groups = list(equals.values())
        self.group = {index: group for group in self.groups for index in group}
        self.alone = sum(len(group) == 1 for group in self.groups) / max(len(self.group), 1)

    def check(self, name: str, genome: Sequence[int]) -> Genome:
        """The genome with all that lies in dropped parts at its first choice; UserError where it breaks the budget."""
        fits = len(genome) == len(self.units) and all(
            0 <= choice < len(bits) for choice, bits in zip(genome, self.bits, strict=True)
        )
        if not fits:
            raise UserError(f"{name} holds {len(genome)} choices that are not those of these {len(self.units)} units")
        if size(self.units, genome) > self.budget:
            raise UserError(f"{name} takes {size(self.units, genome)} bits: the budget is {self.budget}")
        return tuple(MutableGenome(self, [int(choice) for choice in genome]).genome)

    def first(self, count: int, rng: np.random.Generator) -> list[Genome]:
        """The one level that has the size of the budget, or up to `count` genomes lowered from the next level above."""
        tops = self._levels()
        exact = [genome for genome in tops if size(self.units, genome) == self.budget]
        if exact:
            return exact[:1]
        above = min((size(self.units, genome), genome) for genome in tops if size(self.units, genome) > self.budget)[1]
        made: dict[Genome, None] = {}
        for _ in range(TRIES * count):
            genome = MutableGenome(self, above)
            genome.descend(rng)
            made[tuple(genome.genome)] = None
            if len(made) == count:
                break
        return list(made)

    def _levels(self) -> list[Genome]:
        """Nothing dropped and every unit at one level, for the levels that all have; last the highest of each."""
        kept = {part: keep for part, (_, keep) in self.parts.items()}
        inner = [unit for index, unit in enumerate(self.units) if index not in self.parts]
        known = [{choice.level for choice in unit.choices} for unit in inner]
        common = [choice.level for choice in inner[0].choices] if inner else []
        genomes = [
            tuple(kept[index] if index in kept else unit.index(level) for index, unit in enumerate(self.units))
            for level in common
            if all(level in levels for levels in known)
        ]
        highest = (kept.get(index, len(bits) - 1) for index, bits in enumerate(self.bits))
        return [*genomes, tuple(highest)]


class MutableGenome:
    """A genome that moves change in place, and may leave over the budget.

    genome: the choices so far. size: their bits. live: of every unit, whether it lies in no dropped part. Moves draw
    from the generator that they are given and from nothing else, so that equal generators make equal genomes.
    """

    def __init__(self, space: Space, genome: Sequence[int]) -> None:
        self.space = space
        self.genome = list(genome)
        self.settle()

    def settle(self) -> None:
        """Bring size and live up to date after parts changed.

        What lies in a dropped part goes to its first choice, so that equal models are equal genomes.
        """
        space = self.space
        self.live = [not out for out in left_out(space.units, self.genome)]
        for unit, live in enumerate(self.live):
            if not live:
                self.genome[unit] = space.parts[unit][0] if unit in space.parts else 0
        self.size = sum(
            bits[choice] for bits, choice, live in zip(space.bits, self.genome, self.live, strict=True) if live
        )

    def cost(self, unit: int, step: int) -> int:
        """Bits that a step adds."""
        bits, choice = self.space.bits[unit], self.genome[unit]
        return bits[choice + step] - bits[choice]

    def move(self, unit: int, step: int) -> None:
        """One level up or down."""
        self.size += self.cost(unit, step)
        self.genome[unit] += step

    def movable(self, step: int, units: Sequence[int] | None = None) -> list[int]:
        """Those of the units, or of all that have levels, that can go a level up or down."""
        live, genome, bits = self.live, self.genome, self.space.bits
        among = self.space.group if units is None else units
        return [unit for unit in among if live[unit] and 0 <= genome[unit] + step < len(bits[unit])]

    def switch(self, count: int, rng: np.random.Generator) -> None:
        """Level switches within groups: one unit goes down, an equal one up, and the budget holds."""
        for _ in range(count):
            units = [unit for unit in self.space.group if self.live[unit]]
            if not units:
                return
            group = self.space.group[_pick(units, rng)]  # that of a random unit: large groups are drawn more often
            for down in rng.permutation(self.movable(-1, group)).tolist():
                room = self.space.budget - self.size - self.cost(down, -1)
                ups = [up for up in self.movable(1, group) if up != down and self.cost(up, 1) <= room]
                if ups:
                    self.move(down, -1)
                    self.move(_pick(ups, rng), 1)
                    break

    def shift(self, count: int, rng: np.random.Generator) -> bool:
        """Raise units of any size and lower others until the budget holds; False where it cannot."""
        raised = set()
        for _ in range(count):
            ups = self.movable(1)
            if ups:
                unit = _pick(ups, rng)
                self.move(unit, 1)
                raised.add(unit)
        return self.lower(rng, raised)

    def lower(self, rng: np.random.Generator, spared: set[int]) -> bool:
        """Lower random units until the budget holds, but not the spared; False where it cannot hold."""
        while self.size > self.space.budget:
            downs = [unit for unit in self.movable(-1) if unit not in spared]
            if not downs:
                return False
            self.move(_pick(downs, rng), -1)
        return True

    def spend(self, rng: np.random.Generator) -> None:
        """Raise random units for as long as the budget holds."""
        while True:
            ups = [unit for unit in self.movable(1) if self.size + self.cost(unit, 1) <= self.space.budget]
            if not ups:
                return
            self.move(_pick(ups, rng), 1)

    def descend(self, rng: np.random.Generator) -> None:
        """Lower random units, and where that is not enough drop random parts, until the budget holds."""
        if not self.lower(rng, set()):
            while self.size > self.space.budget:
                self.drop(_pick(self.kept(), rng))
        # The last one dropped may have been larger than it had to be.
        for part in rng.permutation(self.dropped()).tolist():
            genome = list(self.genome)
            self.restore(part)
            if self.size > self.space.budget:
                self.genome = genome
                self.settle()
        self.spend(rng)

    def kept(self) -> list[int]:
        """Parts that can be dropped."""
        return [part for part, (drop, _) in self.space.parts.items() if self.live[part] and self.genome[part] != drop]

    def dropped(self) -> list[int]:
        """Parts that can come back."""
        return [part for part, (drop, _) in self.space.parts.items() if self.live[part] and self.genome[part] == drop]

    def drop(self, part: int) -> None:
        """Leave a part out."""
        self.genome[part] = self.space.parts[part][0]
        self.settle()

    def restore(self, part: int, like: Sequence[int] = ()) -> None:
        """Bring a part back, all of it: at these choices, one for each unit inside, or at the first ones."""
        self.genome[part] = self.space.parts[part][1]
        for place, unit in enumerate(self.space.inside[part]):
            if unit in self.space.parts:
                self.genome[unit] = self.space.parts[unit][1]
            if place < len(like):
                self.genome[unit] = min(like[place], len(self.space.bits[unit]) - 1)
        self.settle()

    def swappable(self) -> list[int]:
        """Dropped parts of a kind of which others are kept."""
        kinds = {self.space.units[part].kind for part in self.kept()}
        return [part for part in self.dropped() if self.space.units[part].kind in kinds]

    def swap(self, count: int, rng: np.random.Generator) -> None:
        """Drop a part and bring back another of its kind, which takes over the levels inside."""
        for _ in range(count):
            options = self.swappable()
            if not options:
                return
            back = _pick(options, rng)
            kind = self.space.units[back].kind
            gone = _pick([part for part in self.kept() if self.space.units[part].kind == kind], rng)
            levels = [self.genome[unit] for unit in self.space.inside[gone]]
            self.drop(gone)
            self.restore(back, levels)

    def trade(self, rng: np.random.Generator) -> None:
        """Drop a part, for bits that levels can take, or bring one back, for bits that levels must give."""
        kept, dropped = self.kept(), self.dropped()
        if dropped and (not kept or rng.random() < 0.5):
            self.restore(_pick(dropped, rng))
        elif kept:
            self.drop(_pick(kept, rng))


def _pick(options: Sequence[int], rng: np.random.Generator) -> int:
    return options[int(rng.integers(len(options)))]
