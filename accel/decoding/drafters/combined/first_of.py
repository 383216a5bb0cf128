"""First of several: the draft of the first drafter that has a proposal.

Source: the rule of Dumitru et al. 2025, arXiv:2502.08923, which copies where it can and uses a draft model elsewhere.
Departs from it: combines any drafters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Memory
from hasten.accel.decoding.drafters.combined.base import Combined
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftKind, DraftSampling, DraftTree


@dataclass(frozen=True)
class FirstOf(Combined):
    """Drafter that tries its members in their order; the most accurate one should come first.

    A draft is of the kind of the member that proposed it: some may be drawn, and others deterministic.
    """

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """That of the members if all agree, else deterministic; `kinds` has those of all members."""
        kinds = {drafter.draft_sampling(sampling) for drafter in self.drafters}
        return kinds.pop() if len(kinds) == 1 else DraftSampling.DETERMINISTIC

    def chains(self) -> bool:
        """Whether all members draft chains."""
        return all(drafter.chains() for drafter in self.drafters)

    def kinds(self, sampling: Sampling) -> frozenset[DraftKind]:
        """The kinds of all members."""
        return frozenset().union(*(drafter.kinds(sampling) for drafter in self.drafters))

    def prefill(self, contexts: Sequence[Context], memory: Memory, budget: int) -> None:
        """Prefill the first member at any time, the others with prompts only: they may never be asked."""
        new = [context for context in contexts if self not in context.state]
        for context in new:
            context.state[self] = True
        for index, (drafter, member_memory) in enumerate(zip(self.drafters, memory, strict=True)):
            drafter.prefill(new if index else contexts, member_memory, budget)

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """The first draft that is not empty."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: Memory, budget: int) -> list[DraftTree]:
        """For each sequence the first draft that is not empty."""
        trees = [DraftTree()] * len(contexts)
        for drafter, member_memory in zip(self.drafters, memory, strict=True):
            undrafted = [index for index, tree in enumerate(trees) if not len(tree)]
            if not undrafted:
                break
            drafts = drafter.propose_all([contexts[index] for index in undrafted], member_memory, budget)
            for index, tree in zip(undrafted, drafts, strict=True):
                trees[index] = tree
        return trees
