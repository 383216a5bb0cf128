"""Union: merges the drafts of several drafters into one tree, which the target verifies in one pass.

Source: SpecInfer's merge-based trees, Miao et al. 2024, arXiv:2305.09781.
Departs from it: the drafts share a budget of nodes in turns, and are deterministic: members propose their most probable
tokens at every temperature.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from hasten.accel.decoding.context import Context, not_drawn
from hasten.accel.decoding.drafters.base import Memory
from hasten.accel.decoding.drafters.combined.base import Combined
from hasten.accel.decoding.tree import ROOT, DraftTree


@dataclass(frozen=True)
class Union(Combined):
    """Drafter that merges the trees of its members: in turn, each member adds its best remaining node.

    A node that several members propose is added once, with the label of the first of them.
    """

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """The merged tree of the members' drafts."""
        return self.propose_all([context], memory, budget)[0]

    def propose_all(self, contexts: Sequence[Context], memory: Memory, budget: int) -> list[DraftTree]:
        """A merged tree for each sequence."""
        # No verifier takes siblings of two distributions.
        with not_drawn(contexts):
            drafts = [
                drafter.propose_all(contexts, member_memory, budget)
                for drafter, member_memory in zip(self.drafters, memory, strict=True)
            ]
        return [merged(trees, budget) for trees in zip(*drafts, strict=True)]


def merged(trees: Sequence[DraftTree], budget: int) -> DraftTree:
    """A tree of at most `budget` nodes: the trees take turns, and each adds its next node."""
    trees = [tree for tree in trees if len(tree)]
    if len(trees) < 2:
        return trees[0].first(budget) if trees else DraftTree()
    tokens: list[int] = []
    parents: list[int] = []
    labels: list[Hashable] = []
    merged_nodes: dict[tuple[int, int], int] = {}  # node of the merged tree by its parent and token
    # For each tree, its nodes to those of the merged tree.
    merged_of: list[dict[int, int]] = [{ROOT: ROOT} for _ in trees]
    next_nodes = [0] * len(trees)
    while len(tokens) < budget and any(node < len(tree) for node, tree in zip(next_nodes, trees, strict=True)):
        for index, tree in enumerate(trees):
            while next_nodes[index] < len(tree):
                node = next_nodes[index]
                next_nodes[index] += 1
                key = merged_of[index][tree.parents[node]], tree.tokens[node]
                is_new = key not in merged_nodes
                if is_new:
                    merged_nodes[key] = len(tokens)
                    tokens.append(key[1])
                    parents.append(key[0])
                    labels.append(tree.label(node))
                merged_of[index][node] = merged_nodes[key]
                if is_new:
                    break
            if len(tokens) == budget:
                break
    return DraftTree(tokens, parents, labels=labels)
