"""Union of several drafts in one tree: each pass of the target verifies what all of them propose.

Source: SpecInfer's merge-based trees, Miao et al. 2024, arXiv:2305.09781.
Departs from it: a budget of nodes is shared, by turns; the drafts are deterministic.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.combined.base import Combined
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Union(Combined):
    """Drafter that merges the trees of its members, each giving its best remaining node in turn, the first one first.

    What several propose is one node, with the label of the first of them.
    """

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Deterministic; UserError where a member draws, as siblings of two distributions fit no verifier."""
        for drafter in self.drafters:
            if drafter.draft_sampling(sampling) is not DraftSampling.DETERMINISTIC:
                raise UserError(
                    f"temperature={sampling.temperature} makes {type(drafter).__name__} draw at random, and a union takes "
                    "deterministic drafts only: leave it out of drafters, or ask for temperature=0"
                )
        return DraftSampling.DETERMINISTIC

    def propose(self, context: Context, memory: Any, budget: int) -> DraftTree:
        """The merged tree of the members' drafts."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: Any, budget: int) -> list[DraftTree]:
        """A merged tree for each sequence."""
        drafts = [
            drafter.propose_all(contexts, its_memory, budget)
            for drafter, its_memory in zip(self.drafters, memory, strict=True)
        ]
        return [merged(trees, budget) for trees in zip(*drafts, strict=True)]


def merged(trees: Sequence[DraftTree], budget: int) -> DraftTree:
    """At most `budget` nodes of several trees, which give their nodes in order and take turns."""
    trees = [tree for tree in trees if len(tree)]
    if len(trees) < 2:
        return trees[0].first(budget) if trees else DraftTree()
    tokens: list[int] = []
    parents: list[int] = []
    labels: list[Hashable] = []
    places: dict[tuple[int, int], int] = {}  # by parent and token
    # By tree: where its nodes are in the merged one.
    where: list[dict[int, int]] = [{ROOT: ROOT} for _ in trees]
    turns = [0] * len(trees)
    while len(tokens) < budget and any(turn < len(tree) for turn, tree in zip(turns, trees, strict=True)):
        for index, tree in enumerate(trees):
            while turns[index] < len(tree):
                node = turns[index]
                turns[index] += 1
                key = where[index][tree.parents[node]], tree.tokens[node]
                is_new = key not in places
                if is_new:
                    places[key] = len(tokens)
                    tokens.append(key[1])
                    parents.append(key[0])
                    labels.append(tree.label(node))
                where[index][node] = places[key]
                if is_new:
                    break
            if len(tokens) == budget:
                break
    return DraftTree(tokens, parents, labels=labels)
