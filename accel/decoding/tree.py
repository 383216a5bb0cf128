"""Drafts: a tree of tokens below the last token of a sequence. A chain is a tree without branches."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

ROOT = -1  # the last committed token, as a parent


class DraftSampling(Enum):
    """How the children of a node were chosen, which determines the verifiers that are unbiased for them."""

    DETERMINISTIC = "deterministic"
    INDEPENDENT = "independent"
    WITHOUT_REPLACEMENT = "without_replacement"


class DraftKind(NamedTuple):
    """Kind of drafts. chains: whether no node of any of them has two children."""

    draft_sampling: DraftSampling
    chains: bool


@dataclass(frozen=True)
class DraftTree:
    """A tree of N drafted tokens.

    tokens: N ids. parents: index of each node's parent, smaller than its own, or ROOT. Siblings are distinct and in the
    order in which they were drawn. The most promising nodes come first: if only n nodes may be verified, take the first
    n.
    draft_probs: for every parent, including ROOT, the distribution (V,) float32 that its first child was drawn from;
    None for deterministic drafts. counts: number of times that each node was drawn, for independent draws; None is
    once. labels: class of each node for acceptance estimates (match length, rank, …); None takes its depth and rank.
    whole: the tree that this one is a part of, see `keep`; None if it is whole itself. confidences: the drafter's own
    probability of each node after its parent; None where it has none.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    draft_sampling: DraftSampling = DraftSampling.DETERMINISTIC
    draft_probs: Mapping[int, Tensor] | None = None
    counts: Sequence[int] | None = None
    labels: Sequence[Hashable] | None = field(default=None, compare=False)
    whole: "DraftTree | None" = field(default=None, compare=False, repr=False)
    confidences: Sequence[float] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.parents), "a parent for every token"
        assert all(ROOT <= parent < node for node, parent in enumerate(self.parents)), "parents come before children"
        assert (self.draft_probs is None) == (self.draft_sampling is DraftSampling.DETERMINISTIC) or not self.tokens, (
            self.draft_sampling
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(
        cls,
        tokens: Sequence[int],
        draft_probs: Sequence[Tensor] | None = None,
        labels: Sequence[Hashable] | None = None,
    ) -> "DraftTree":
        """A chain of tokens. draft_probs: distribution (V,) that each was drawn from; None for deterministic drafts."""
        probs = None if draft_probs is None else dict(zip(range(ROOT, len(tokens) - 1), draft_probs, strict=True))
        draft_sampling = DraftSampling.DETERMINISTIC if probs is None else DraftSampling.INDEPENDENT
        return cls(tokens, range(ROOT, len(tokens) - 1), draft_sampling, probs, labels=labels)

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """Children of every parent that has any, in the order in which they were drawn."""
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(node)
        return children

    @cached_property
    def depths(self) -> list[int]:
        """Depth of each node; 1 for children of ROOT."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    @property
    def proposed(self) -> "DraftTree":
        """The tree as the drafter proposed it, before nodes were dropped."""
        return self if self.whole is None else self.whole

    @property
    def is_chain(self) -> bool:
        """Whether every node has one child at most."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def label(self, node: int) -> Hashable:
        """Class of a node for acceptance estimates."""
        if self.labels is not None:
            return self.labels[node]
        return self.depths[node], self.children[self.parents[node]].index(node)

    def path(self, node: int) -> list[int]:
        """Nodes from the root to this one, itself included; empty for ROOT."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def first(self, count: int) -> "DraftTree":
        """The tree of the first `count` nodes."""
        return self if count >= len(self) else self.keep(range(count))

    def keep(self, nodes: Sequence[int]) -> "DraftTree":
        """The tree of some nodes, in ascending order, each with its parent.

        A choice that depends on drawn tokens biases every verifier that reads draft_probs.
        """
        new = {ROOT: ROOT} | {node: index for index, node in enumerate(nodes)}
        parents = [new[self.parents[node]] for node in nodes]
        probs = self.draft_probs
        if probs is not None:
            probs = {new[parent]: probs[parent] for parent in {self.parents[node] for node in nodes}}
        return DraftTree(
            [self.tokens[node] for node in nodes],
            parents,
            self.draft_sampling,
            probs,
            None if self.counts is None else [self.counts[node] for node in nodes],
            [self.label(node) for node in nodes],  # explicit, because ranks among siblings change
            self.proposed,
            None if self.confidences is None else [self.confidences[node] for node in nodes],
        )


@dataclass(frozen=True)
class VirtualNodes:
    """Nodes of a pass behind those of a draft of `drafted` nodes: virtual tokens, which are neither verified nor kept.

    numbers: of the virtual tokens, see `Target.virtual`. parents: index of each node's parent, smaller than its own:
    below `drafted` a node of the draft, from there on a virtual one; or ROOT.
    """

    drafted: int
    numbers: Sequence[int] = ()
    parents: Sequence[int] = ()

    def __post_init__(self) -> None:
        assert len(self.numbers) == len(self.parents), "a parent for every virtual node"
        assert all(ROOT <= parent < node for node, parent in enumerate(self.parents, self.drafted)), self.parents

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def anchors(self) -> list[int]:
        """The node of the draft, or ROOT, that each virtual node hangs on."""
        anchors: list[int] = []
        for parent in self.parents:
            anchors.append(parent if parent < self.drafted else anchors[parent - self.drafted])
        return anchors

    def on(self, anchor: int) -> list[int]:
        """Indices among the virtual nodes of those that hang on a node of the draft, or on ROOT."""
        return [index for index, own in enumerate(self.anchors) if own == anchor]

    def within(self, tree: DraftTree, max_depth: int) -> "VirtualNodes":
        """The virtual nodes of a depth of at most max_depth; children of ROOT have depth 1. tree: the draft."""
        depths = list(tree.depths)
        kept: dict[int, int] = {}
        for node, parent in enumerate(self.parents, self.drafted):
            depths.append(1 if parent == ROOT else depths[parent] + 1)
            if depths[-1] <= max_depth:
                kept[node] = self.drafted + len(kept)
        parents = [self.parents[node - self.drafted] for node in kept]
        numbers = [self.numbers[node - self.drafted] for node in kept]
        return VirtualNodes(self.drafted, numbers, [kept.get(parent, parent) for parent in parents])
