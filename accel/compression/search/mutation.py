"""Offspring of a genome: random changes of a few levels and parts, always within the budget.

Source: Sieberling et al. 2024, arXiv:2410.14649 (EvoPress).
Departs from it: a switch may leave bits over, since the budget is exact bits of any units, and half of the offspring
spend them. Units of different sizes trade bits with one another in a share of the offspring (`across`), and always
where no unit has an equal. Of several variants of an offspring the one is kept whose units' errors add up to the least
(`foresight`): most random switches are worse. Parts are dropped and levels switched in one search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hasten.accel.compression.allocators.base import error, size
from hasten.accel.compression.search.moves import TRIES, Genome, MutableGenome, Space

# Units that a move across groups may change; one that changes more is a jump, which is hardly ever better.
_MAX_CHANGES = 10
# Share of the offspring that spend what is left of the budget. Not all: more bits are not always better.
_SPEND = 0.5
# Share of the offspring that drop parts or bring them back, where levels can be switched too.
_PARTS = 0.25


@dataclass(frozen=True)
class Mutation:
    """How offspring are made.

    max_switches: in one offspring. grouped: False lets all switches be between units of any size. across: share of the
    offspring for which that holds in any case, 0 to 1. foresight: variants made of every offspring.
    """

    max_switches: int
    grouped: bool
    across: float
    foresight: int

    def offspring(self, space: Space, parent: Genome, count: int, rng: np.random.Generator) -> list[Genome]:
        """Up to `count` different genomes within the budget, none of them the parent's; fewer where there are few."""
        made: dict[Genome, None] = {}
        for _ in range(TRIES * count):
            if len(made) == count:
                break
            variants = [MutableGenome(space, parent) for _ in range(self.foresight)]
            fitting = [tuple(variant.genome) for variant in variants if self.mutate(variant, rng)]
            new = [genome for genome in fitting if genome != parent and genome not in made]
            if new:
                made[min(new, key=partial(error, space.units))] = None
        assert all(size(space.units, genome) <= space.budget for genome in made), "an offspring is over the budget"
        return list(made)

    def mutate(self, variant: MutableGenome, rng: np.random.Generator) -> bool:
        """Whether a few random changes led to a genome within the budget."""
        space, parent = variant.space, list(variant.genome)
        # The smaller of two: few changes are more likely.
        switches = int(rng.integers(1, self.max_switches + 1, 2).min())
        if space.parts and (not space.groups or rng.random() < _PARTS):
            return self._change_parts(variant, switches, rng)
        # A unit without an equal can only move across groups, and within one group there is nothing to cross.
        share = max(space.alone, self.across if len(space.groups) > 1 else 0.0) if self.grouped else 1.0
        across = rng.random() < share
        if across and not variant.shift(switches, rng):
            return False
        if not across:
            variant.switch(switches, rng)
        if rng.random() < _SPEND:
            variant.spend(rng)
        return not across or _changes(parent, variant.genome) <= _MAX_CHANGES

    @staticmethod
    def _change_parts(variant: MutableGenome, switches: int, rng: np.random.Generator) -> bool:
        """Swap parts of a kind, or trade a part for levels; whether the budget holds."""
        if variant.space.groups and (not variant.swappable() or rng.random() < 0.5):
            variant.trade(rng)
        else:
            variant.swap(switches, rng)
        if not variant.lower(rng, set()):
            return False
        variant.spend(rng)
        return True


def _changes(before: Sequence[int], after: Sequence[int]) -> int:
    return sum(new != old for new, old in zip(after, before, strict=True))
