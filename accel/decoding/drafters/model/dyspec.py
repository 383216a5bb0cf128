"""DySpec: the tree grows where the draft model predicts the highest probability of acceptance.

Source: Xiong et al. 2024, arXiv:2410.11744. A node's next slot for a child has an estimate v of being reached; the
greedy tree fills the slot with the largest v until the budget is spent. Let R be the draft's distribution without the
tokens already drawn. A drawn token y leaves v (1 - R[y]) to the node's next slot, and v R[y] to the new node's first.
Departs from it: slots are filled level by level, with one pass of the draft model a level instead of one a node. No
slot's estimate exceeds that of the slot it came from, so the greedy tree consists of the largest slots: a slot below
the `budget` largest so far need not be filled.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import GrowingTree, Growth, SmallModel, SmallModelDrafter
from hasten.accel.decoding.drafters.without_replacement import Candidate, draw_distinct, ranked
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class DySpec(SmallModelDrafter):
    """Drafter of the `budget` slots with the largest estimates.

    threshold: slots with a smaller estimate are dropped, which makes the tree smaller; 0 drops none. At temperature 0
    a slot's estimate is the path probability of the node's next most probable token: a best-first search.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold={self.threshold} must be from 0 to below 1")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Draws without replacement; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def max_evaluated(self, budget: int) -> int:
        """Twice the budget: some evaluated nodes are displaced by larger ones later."""
        return 2 * budget

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """The tree, largest slots first: its first n nodes are the tree for a budget of n."""
        greedy = context.drafting.is_greedy
        tree = GrowingTree(context, memory, logits)
        slots: dict[int, float] = {}  # estimate of the slot that each node is in
        reached = {ROOT: 1.0}  # estimate of every node's own first slot
        largest: list[float] = []  # heap of the `budget` largest estimates so far
        level, evaluated = [ROOT], 0
        while level:
            yield from tree.evaluate(level)
            evaluated += len(level)
            below = []
            for node in level:
                probs = tree.probs[node]
                children = ranked(probs, budget) if greedy else draw_distinct(probs, context.draft_generator)
                below.append(_slots(node, reached[node], children, greedy))
            level = []
            for negative, node, token, share in heapq.merge(*below):
                slot = -negative
                if slot < self.threshold or (len(largest) == budget and slot <= largest[0]):
                    break
                (heapq.heappush if len(largest) < budget else heapq.heapreplace)(largest, slot)
                child = tree.add(node, token)
                slots[child] = slot
                # Rounding could make it exceed the node's own slot, and put a child before its parent.
                reached[child] = min(slot, reached[node] * share)
                level.append(child)
            level = [
                node
                for node in level
                if reached[node] >= self.threshold and (len(largest) < budget or reached[node] > largest[0])
            ][: self.max_evaluated(budget) - evaluated]
        best = sorted(slots, key=lambda node: (-slots[node], node))[:budget]
        return tree.done(self.draft_sampling(context.drafting), nodes=best)


def _slots(
    node: int, reached: float, children: Iterator[Candidate], greedy: bool
) -> Iterator[tuple[float, int, int, float]]:
    """(-estimate, node, token, share) of a node's slots, the largest estimate first."""
    for candidate in children:
        yield -reached * (candidate.prob if greedy else candidate.remaining), node, candidate.token, candidate.prob
