"""First of several: the draft of the first drafter that has one.

Source: the rule of Dumitru et al. 2025, arXiv:2502.08923, which copies where it can and asks a draft model elsewhere.
Departs from it: for any drafters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Memory
from hasten.accel.decoding.drafters.combined.base import Combined
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftTree, Draws


@dataclass(frozen=True)
class FirstOf(Combined):
    """Drafter that asks its members in turn; the surest one stands first.

    Where they choose children in different ways, all drafts pass for deterministic ones, which no verifier that takes
    such is biased by: it may accept fewer than one that knew what they were drawn from.
    """

    def draws(self, sampling: Sampling) -> Draws:
        """The way of all members, if it is the same."""
        kinds = {each.draws(sampling) for each in self.drafters}
        return kinds.pop() if len(kinds) == 1 else Draws.DETERMINISTIC

    def chains(self) -> bool:
        """Whether all members draft chains."""
        return all(each.chains() for each in self.drafters)

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """The first draft that is not empty."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: Memory, budget: int) -> list[DraftTree]:
        """For each sequence the first draft that is not empty."""
        found = [DraftTree()] * len(contexts)
        for each, its in zip(self.drafters, memory, strict=True):
            left = [index for index, tree in enumerate(found) if not len(tree)]
            if not left:
                break
            for index, tree in zip(left, each.propose_all([contexts[i] for i in left], its, budget), strict=True):
                found[index] = tree
        return [self._as_said(tree, context) for tree, context in zip(found, contexts, strict=True)]

    def _as_said(self, tree: DraftTree, context: Context) -> DraftTree:
        if not len(tree) or tree.draws is self.draws(context.sampling):
            return tree
        return replace(tree, draws=Draws.DETERMINISTIC, draft_probs=None, counts=None)
