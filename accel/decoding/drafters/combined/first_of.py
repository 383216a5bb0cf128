"""First of several: the draft of the first drafter that has a proposal.

Source: the rule of Dumitru et al. 2025, arXiv:2502.08923, which copies where it can and uses a draft model elsewhere.
Departs from it: combines any drafters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Memory
from hasten.accel.decoding.drafters.combined.base import Combined
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import DraftSampling, DraftTree


@dataclass(frozen=True)
class FirstOf(Combined):
    """Drafter that tries its members in their order; the most accurate one should come first.

    If the members differ in how they choose children, all drafts are declared deterministic. Every verifier of
    deterministic drafts stays unbiased, but it may accept fewer tokens than one that knows the draft distributions.
    """

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """That of the members if all agree, else deterministic."""
        kinds = {drafter.draft_sampling(sampling) for drafter in self.drafters}
        return kinds.pop() if len(kinds) == 1 else DraftSampling.DETERMINISTIC

    def chains(self) -> bool:
        """Whether all members draft chains."""
        return all(drafter.chains() for drafter in self.drafters)

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
        return [self._with_declared_sampling(tree, context) for tree, context in zip(trees, contexts, strict=True)]

    def _with_declared_sampling(self, tree: DraftTree, context: Context) -> DraftTree:
        if not len(tree) or tree.draft_sampling is self.draft_sampling(context.sampling):
            return tree
        return replace(tree, draft_sampling=DraftSampling.DETERMINISTIC, draft_probs=None, counts=None)
