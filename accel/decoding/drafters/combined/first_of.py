"""First of several: the draft of the first drafter that has one.

Source: the rule of Dumitru et al. 2025, arXiv:2502.08923, which copies where it can and asks a draft model elsewhere.
Departs from it: for any drafters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.combined.base import Combined
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftSampling, DraftTree


@dataclass(frozen=True)
class FirstOf(Combined):
    """Drafter that asks its members in turn; the surest one stands first.

    Where they choose children in different ways, all drafts pass for deterministic ones, which no verifier that takes
    such is biased by: it may accept fewer than one that knew what they were drawn from.
    """

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """The way of all members, if it is the same."""
        kinds = {drafter.draft_sampling(sampling) for drafter in self.drafters}
        return kinds.pop() if len(kinds) == 1 else DraftSampling.DETERMINISTIC

    def chains(self) -> bool:
        """Whether all members draft chains."""
        return all(drafter.chains() for drafter in self.drafters)

    def propose(self, context: Context, memory: Any, budget: int) -> DraftTree:
        """The first draft that is not empty."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: Any, budget: int) -> list[DraftTree]:
        """For each sequence the first draft that is not empty."""
        trees = [DraftTree()] * len(contexts)
        for drafter, its_memory in zip(self.drafters, memory, strict=True):
            left = [index for index, tree in enumerate(trees) if not len(tree)]
            if not left:
                break
            for index, tree in zip(
                left, drafter.propose_all([contexts[i] for i in left], its_memory, budget), strict=True
            ):
                trees[index] = tree
        return [self._as_said(tree, context) for tree, context in zip(trees, contexts, strict=True)]

    def _as_said(self, tree: DraftTree, context: Context) -> DraftTree:
        if not len(tree) or tree.draft_sampling is self.draft_sampling(context.sampling):
            return tree
        return replace(tree, draft_sampling=DraftSampling.DETERMINISTIC, draft_probs=None, counts=None)
