"""RSD-C: a tree of constant branching whose siblings the draft model draws without replacement.

Source: Jeon et al. 2024, arXiv:2402.14160 (recursive speculative decoding, constant branching factors).
Departs from it: siblings are drawn one after the other, which has the distribution of the paper's Gumbel-top-k. If the
budget is smaller than the tree, the last level lacks its later draws. Which nodes are left out is decided before
anything is drawn, because a choice by what was drawn would bias the verifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import GrowingTree, Growth, SmallModel, SmallModelDrafter
from hasten.accel.decoding.drafters.without_replacement import draw_distinct, ranked
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class RSDConstant(SmallModelDrafter):
    """Drafter that gives every node of depth d branching[d] children; at temperature 0 the most probable ones."""

    branching: tuple[int, ...] = (2, 2, 1)

    def __post_init__(self) -> None:
        given = self.branching
        if not isinstance(given, Sequence) or not given or not all(isinstance(b, int) and b >= 1 for b in given):
            raise UserError(f"branching={given} must be a list with the number of children at each depth, 1 or more")
        object.__setattr__(self, "branching", tuple(given))  # a config gives a list

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Draws without replacement; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def chains(self) -> bool:
        """Whether no node has two children."""
        return max(self.branching) == 1

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """The tree, with one pass of the draft model a level; within a level, nodes of early draws come first."""
        tree = GrowingTree(context, memory, logits)
        nodes: dict[tuple[int, ...], int] = {(): ROOT}
        for level in self._planned(budget):
            children: dict[tuple[int, ...], int] = {}
            for ranks in level:
                children[ranks[:-1]] = max(children.get(ranks[:-1], 0), ranks[-1] + 1)
            # Where a distribution has fewer tokens than children were planned, that part of the tree is missing.
            above = [ranks for ranks in children if ranks in nodes]
            yield from tree.evaluate([nodes[ranks] for ranks in above])
            drawn_tokens: dict[tuple[int, ...], int] = {}
            for ranks in above:
                probs, count = tree.probs[nodes[ranks]], children[ranks]
                greedy = context.drafting.is_greedy
                candidates = ranked(probs, count) if greedy else draw_distinct(probs, context.draft_generator)
                for rank, candidate in enumerate(islice(candidates, count)):
                    drawn_tokens[*ranks, rank] = candidate.token
            for ranks in level:
                if ranks in drawn_tokens:
                    nodes[ranks] = tree.add(nodes[ranks[:-1]], drawn_tokens[ranks])
        return tree.done(self.draft_sampling(context.drafting))

    def _planned(self, budget: int) -> list[list[tuple[int, ...]]]:
        """Nodes of every level within the budget; a node is the path of its draw ranks from the root."""
        levels: list[list[tuple[int, ...]]] = []
        above: Sequence[tuple[int, ...]] = [()]
        for children in self.branching:
            level = [(*ranks, rank) for ranks in above for rank in range(children)]
            above = sorted(level, key=lambda ranks: (sum(ranks), ranks))[:budget]
            budget -= len(above)
            if not above:
                break
            levels.append(list(above))
        return levels
