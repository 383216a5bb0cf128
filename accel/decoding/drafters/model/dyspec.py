"""DySpec: the tree grows where the draft model holds acceptance to be most probable.

Source: Xiong et al. 2024, arXiv:2410.11744. A node's next slot for a child has an estimate v of being reached; the
greedy tree fills the slot of the largest v until the budget is spent. With R the rest of the draft's distribution, a
drawn token y leaves the node's next slot v (1 - R[y]) and gives the new node's own first slot v R[y].
Departs from it: no slot's estimate is larger than that of the slot it came from, so that the greedy tree is that of the
largest slots. It is found level by level, with one pass of the draft model for each, and not with one for each node:
slots below the largest found so far are not filled.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import GrowingTree, Growth, SmallModel, SmallModelDrafter
from hasten.accel.decoding.drafters.without_replacement import Candidate, drawn, ranked
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class DySpec(SmallModelDrafter):
    """Drafter of the slots with the largest estimates, as many as the budget has.

    threshold: slots with an estimate below it are left out, and the tree is smaller; 0 leaves none out. At temperature
    0 a slot's estimate is the cumulative probability of the next most probable token: a best-first search.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold={self.threshold} must be from 0 to below 1")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Without replacement, unless there is nothing to draw."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def shown(self, budget: int) -> int:
        """Some nodes are shown and fall out of the largest later."""
        return 2 * budget

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """The tree, the largest slots first: the first n nodes are the tree of a budget of n."""
        greedy = context.sampling.is_greedy
        tree = GrowingTree(context, memory, logits)
        slots: dict[int, float] = {}  # estimate of the slot that each node is in
        reached = {ROOT: 1.0}  # estimate of every node's own first slot
        largest: list[float] = []  # of the slots, a heap of as many as the budget has
        level, shown = [ROOT], 0
        while level:
            yield from tree.show(level)
            shown += len(level)
            below = []
            for node in level:
                probs = tree.probs[node]
                children = ranked(probs, budget) if greedy else drawn(probs, context.draft_generator)
                below.append(_slots(node, reached[node], children, greedy))
            level = []
            for negative, node, token, share in heapq.merge(*below):
                slot = -negative
                if slot < self.threshold or (len(largest) == budget and slot <= largest[0]):
                    break
                (heapq.heappush if len(largest) < budget else heapq.heapreplace)(largest, slot)
                child = tree.add(node, token)
                slots[child] = slot
                # Equal up to rounding where nothing else was left; it must not come before its parent.
                reached[child] = min(slot, reached[node] * share)
                level.append(child)
            level = [
                node
                for node in level
                if reached[node] >= self.threshold and (len(largest) < budget or reached[node] > largest[0])
            ][: self.shown(budget) - shown]
        best = sorted(slots, key=lambda node: (-slots[node], node))[:budget]
        return tree.done(self.draft_sampling(context.sampling), nodes=best)


def _slots(
    node: int, reached: float, children: Iterator[Candidate], greedy: bool
) -> Iterator[tuple[float, int, int, float]]:
    """(-estimate, node, token, share) of a node's slots, the largest estimate first."""
    for candidate in children:
        yield -reached * (candidate.share if greedy else candidate.left), node, candidate.token, candidate.share
