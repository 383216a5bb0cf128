"""Offspring of a genome: random changes of a few levels and parts within the budget.

Source: Sieberling et al. 2024, arXiv:2410.14649 (EvoPress).
Departs from it: the budget is an exact cost of arbitrary units, so a switch may leave a rest; half of the offspring
spend it. In a share of the offspring (`across`), units of different sizes trade bits; always where no two units have
equal sizes. Of several variants of an offspring, the one with the least sum of unit errors is kept (`foresight`),
because most random switches are worse. One search both drops parts and switches levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hasten.accel.compression.allocators.base import cost, error
from hasten.accel.compression.search.moves import TRIES, Genome, MutableGenome, Space

# Maximum number of units that a move across groups may change; larger moves are hardly ever better.
_MAX_CHANGES = 10
# Share of the offspring that spend the rest of the budget. Not all do, because more bits are not always better.
_SPEND = 0.5
# Share of the offspring that drop or restore parts, in problems where levels can be switched, too.
_PARTS = 0.25


@dataclass(frozen=True)
class Mutation:
    """Parameters of a mutation.

    max_switches: maximum number of switches in an offspring. grouped: True limits switches to units of equal sizes.
    across: share of the offspring that is exempt from that, 0 to 1. foresight: variants made of every offspring.
    """

    max_switches: int
    grouped: bool
    across: float
    foresight: int

    def offspring(self, space: Space, parent: Genome, count: int, rng: np.random.Generator) -> list[Genome]:
        """`count` distinct genomes within the budget, without the parent; fewer where there are not as many."""
        made: dict[Genome, None] = {}
        for _ in range(TRIES * count):
            if len(made) == count:
                break
            variants = [MutableGenome(space, parent) for _ in range(self.foresight)]
            fitting = [tuple(variant.genome) for variant in variants if self.mutate(variant, rng)]
            new = [genome for genome in fitting if genome != parent and genome not in made]
            if new:
                made[min(new, key=partial(error, space.units))] = None
        assert all(cost(space.units, genome) <= space.budget for genome in made), "an offspring is over the budget"
        return list(made)

    def mutate(self, variant: MutableGenome, rng: np.random.Generator) -> bool:
        """Change the variant at random; returns whether it is within the budget."""
        space, parent = variant.space, list(variant.genome)
        # The smaller of two random numbers, so that few changes are more likely.
        switches = int(rng.integers(1, self.max_switches + 1, 2).min())
        if space.parts and (not space.groups or rng.random() < _PARTS):
            return self._change_parts(variant, switches, rng)
        # A unit that is alone in its group can only trade across groups; with one group there is nothing to cross.
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
        """Swap parts of a kind, or trade a part for levels; returns whether the budget holds."""
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
