"""RSD-C: a tree of constant branching whose siblings the draft model draws without replacement.

Source: Jeon et al. 2024, arXiv:2402.14160 (recursive speculative decoding, constant branching factors).
Departs from it: siblings are drawn one after the other, which is the distribution of the paper's Gumbel-top-k. Where
the budget is smaller than the tree, later draws are left out before earlier ones, in the deepest level that is begun;
which are left out is settled before anything is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import GrowingTree, Growth, SmallModel, SmallModelDrafter
from hasten.accel.decoding.drafters.without_replacement import drawn, ranked
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class RSDConstant(SmallModelDrafter):
    """Drafter that gives every node of depth d branching[d] children; the most probable ones at temperature 0."""

    branching: tuple[int, ...] = (2, 2, 1)

    def __post_init__(self) -> None:
        given = self.branching
        if not isinstance(given, Sequence) or not given or not all(isinstance(b, int) and b >= 1 for b in given):
            raise UserError(f"branching={given} must be a list of numbers of children by depth, each 1 or more")
        object.__setattr__(self, "branching", tuple(given))  # a config gives a list

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Without replacement, unless there is nothing to draw."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def chains(self) -> bool:
        """Only where no node has two children."""
        return max(self.branching) == 1

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """The tree level by level, one pass for each; nodes of early draws first."""
        tree = GrowingTree(context, memory, logits)
        nodes: dict[tuple[int, ...], int] = {(): ROOT}
        for level in self._planned(budget):
            children: dict[tuple[int, ...], int] = {}
            for ranks in level:
                children[ranks[:-1]] = max(children.get(ranks[:-1], 0), ranks[-1] + 1)
            # A distribution with fewer tokens than were planned leaves a part of the tree out.
            above = [ranks for ranks in children if ranks in nodes]
            yield from tree.show([nodes[ranks] for ranks in above])
            found: dict[tuple[int, ...], int] = {}
            for ranks in above:
                probs, count = tree.probs[nodes[ranks]], children[ranks]
                each = ranked(probs, count) if context.sampling.is_greedy else drawn(probs, context.draft_generator)
                found |= {(*ranks, rank): candidate.token for rank, candidate in enumerate(islice(each, count))}
            for ranks in level:
                if ranks in found:
                    nodes[ranks] = tree.add(nodes[ranks[:-1]], found[ranks])
        return tree.done(self.draft_sampling(context.sampling))

    def _planned(self, budget: int) -> list[list[tuple[int, ...]]]:
        """Nodes of every level, as the ranks of their draws from the top."""
        found: list[list[tuple[int, ...]]] = []
        above: Sequence[tuple[int, ...]] = [()]
        for children in self.branching:
            level = [(*ranks, rank) for ranks in above for rank in range(children)]
            above = sorted(level, key=lambda ranks: (sum(ranks), ranks))[:budget]
            budget -= len(above)
            if not above:
                break
            found.append(list(above))
        return found
