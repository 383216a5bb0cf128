"""Base of drafters whose drafts come out of the target's own pass, from virtual tokens behind the nodes of its tree.

The virtual tokens that hang on the last accepted node are the next draft: token i drafts depth i. A node with fewer of
them gives a draft of less depth, and candidates and virtual tokens share the nodes of a pass.
Source of the dynamic sparse tree: Chen et al. 2024, arXiv:2405.18628 (PPD). The number of virtual positions that the
last accepted node had is the state k; for each k the tree has a size of its own, and virtual tokens go where they add
most expected tokens.
Departs from it: the numbers of candidates and virtual tokens maximise the expected tokens of this pass and of the next
one, in place of those of the steady state; candidates are the most probable ones of every draft (tree=dynamic), where
the paper takes those of a fixed set of ranks (tree=static). The adaptive draft length chooses the number of nodes of a
pass by its measured cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, nlargest
from itertools import pairwise
from math import log2
from typing import NamedTuple

from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.heads.base import HeadDrafter, HeadMemory
from hasten.accel.decoding.targets.virtual import VirtualTokens
from hasten.accel.decoding.tree import ROOT, DraftTree, VirtualNodes
from hasten.accel.training.heads.virtual import VirtualNetwork

# Acceptance by rank, of a head whose rates were not measured; at each further depth it is less by this factor.
_RANKS, _DEEPER = (0.4, 0.12, 0.06, 0.04), 0.7
_CLASSES = 12  # of nodes for acceptance estimates: half powers of two of the probability

# Tokens of a depth with their probabilities, most probable first.
Level = tuple[Sequence[int], Sequence[float]]


class Candidate(NamedTuple):
    """A node of a draft. value: probability of its path. rank: among its siblings."""

    token: int
    parent: int
    prob: float
    value: float
    rank: int
    depth: int


@dataclass(frozen=True)
class _Levels:
    """The drafts of each depth for a sequence of `length` tokens."""

    length: int
    levels: Sequence[Level]


def most_probable_paths(levels: Sequence[Level], budget: int) -> list[Candidate]:
    """The `budget` nodes with the largest values, in descending order, of the tree that has each level below each node.

    Levels are independent of what was drafted above them.
    """
    nodes: list[Candidate] = []
    heap: list[tuple[float, int, int, int, int, float]] = []  # -value, age, parent, depth, rank, value of the parent

    def put(parent: int, depth: int, rank: int, above: float) -> None:
        if depth <= len(levels) and rank < len(levels[depth - 1][0]) and levels[depth - 1][1][rank] > 0:
            heappush(heap, (-above * levels[depth - 1][1][rank], len(nodes), parent, depth, rank, above))

    put(ROOT, 1, 0, 1.0)
    while heap and len(nodes) < budget:
        value, _, parent, depth, rank, above = heappop(heap)
        tokens, probs = levels[depth - 1]
        nodes.append(Candidate(tokens[rank], parent, probs[rank], -value, rank, depth))
        put(parent, depth, rank + 1, above)
        put(len(nodes) - 1, depth + 1, 0, -value)
    return nodes


def ends(parents: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    """Probability that the accepted path ends at each node, ROOT included."""
    at = {ROOT: 1.0, **dict(enumerate(values))}
    for parent, value in zip(parents, values, strict=True):
        at[parent] -= value
    return {node: max(value, 0.0) for node, value in at.items()}


class SparseTrees:
    """Sizes of trees. rates: acceptance by depth and rank, of m depths. ensemble: virtual tokens of a position."""

    def __init__(self, rates: Sequence[Sequence[float]], ensemble: int) -> None:
        self.positions, self.ensemble = len(rates), ensemble
        self._levels: list[Level] = [(range(len(row)), sorted(row, reverse=True)) for row in rates]
        self._candidates: dict[tuple[int, int], int] = {}
        self._gains: dict[int, list[float]] = {}
        self._most: dict[int, int] = {}

    def candidates(self, state: int, budget: int) -> int:
        """How many of `budget` nodes are candidates, if drafts of `state` depths are at hand."""
        key = state, budget
        if key not in self._candidates:
            nodes = most_probable_paths(self._levels[:state], budget)
            accepted, best = 0.0, (-1.0, 0)
            for count in range(len(nodes) + 1):
                accepted += nodes[count - 1].value if count else 0.0
                parents, values = [node.parent for node in nodes[:count]], [node.value for node in nodes[:count]]
                drafts = sum(gain for _, gain in self.placed(ends(parents, values), budget, budget - count))
                best = max(best, (accepted + drafts, count))
            self._candidates[key] = best[1]
        return self._candidates[key]

    def most_virtual(self, budget: int) -> int:
        """The largest number of virtual nodes among `budget` nodes of a pass, whatever its state."""
        if budget not in self._most:
            free = [budget - self.candidates(state, budget) for state in range(self.positions + 1)]
            least = min(budget, self.positions * self.ensemble)  # those of the root, if nothing is drafted
            self._most[budget] = max(least, *free[1:]) // self.ensemble * self.ensemble
        return self._most[budget]

    def gains(self, budget: int) -> list[float]:
        """Tokens that a first, second, … position adds to those that the next pass accepts; descending."""
        if budget not in self._gains:
            # About half of the nodes of a pass are candidates.
            expected = [0.0]
            for depth in range(1, self.positions + 1):
                nodes = most_probable_paths(self._levels[:depth], (budget + 1) // 2)
                expected.append(sum(node.value for node in nodes))
            gains = [more - less for less, more in pairwise(expected)]
            # A position needs those before it.
            self._gains[budget] = [min(gains[: index + 1]) for index in range(len(gains))]
        return self._gains[budget]

    def placed(self, ending: dict[int, float], budget: int, nodes: int) -> list[tuple[int, float]]:
        """Nodes that get a further position, and the expected tokens of it, for at most `nodes` virtual nodes.

        ending: probability that the accepted path ends at each node. budget: nodes of the pass.
        """
        gains = self.gains(budget)
        options = [(chance * gain, -index, node) for node, chance in ending.items() for index, gain in enumerate(gains)]
        chosen = nlargest(nodes // self.ensemble, options, key=lambda option: option[:2])
        return [(node, gain) for gain, _, node in chosen if gain > 0]


@dataclass(frozen=True)
class VirtualDrafter(HeadDrafter):
    """Drafter with a head of virtual tokens. branches: candidates below a node, at most; width is not read."""

    def virtual_tokens(self, memory: HeadMemory) -> VirtualTokens | None:
        """Those of the head."""
        return memory.network.virtual()

    def trees(self, memory: HeadMemory) -> SparseTrees:
        """The sizes of its trees, by the rates that were measured in training."""
        key = self.branches, self.depth
        if key not in memory.cache:
            network = memory.network
            assert isinstance(network, VirtualNetwork)
            positions = min(self.depth or network.max_depth, network.max_depth)
            rates = memory.rates or [[rate * _DEEPER**depth for rate in _RANKS] for depth in range(network.max_depth)]
            rows = [list(row[: self.branches]) for row in rates[:positions]]
            memory.cache[key] = SparseTrees(rows, network.ensemble)
        trees: SparseTrees = memory.cache[key]
        return trees

    def max_virtual_nodes(self, memory: HeadMemory, budget: int) -> int:
        """The largest number that a tree of this size has."""
        return self.trees(memory).most_virtual(budget) if budget else 0

    def propose_all(self, contexts: Sequence[Context], memory: HeadMemory, budget: int) -> list[DraftTree]:
        """The candidates of each sequence, of which the passes before have given the probabilities."""
        return [self._tree(context, memory, budget) for context in contexts]

    def _tree(self, context: Context, memory: HeadMemory, budget: int) -> DraftTree:
        levels = self._levels(context, memory)
        nodes = most_probable_paths(levels, self.trees(memory).candidates(len(levels), budget)) if levels else []
        static = self.tree == "static"
        labels = [
            (self.name, node.depth * 100 + node.rank if static else min(int(-2 * log2(max(node.prob, 1e-9))), _CLASSES))
            for node in nodes
        ]
        return DraftTree([node.token for node in nodes], [node.parent for node in nodes], labels=labels)

    def _levels(self, context: Context, memory: HeadMemory) -> Sequence[Level]:
        """The drafts at hand; none if the sequence has grown since without virtual tokens."""
        known: _Levels | None = context.state.get(self)
        if known is None or known.length != len(context.tokens):
            return ()
        if self.tree == "dynamic":
            return known.levels
        rates = memory.rates or ()
        return [
            (tokens[: len(rate)], sorted(rate, reverse=True)[: len(tokens)])
            for (tokens, _), rate in zip(known.levels, rates, strict=False)
        ]

    def virtual_nodes(self, context: Context, memory: HeadMemory, tree: DraftTree, budget: int) -> VirtualNodes:
        """Virtual tokens behind those nodes of the draft at which they add most to the expected tokens."""
        trees = self.trees(memory)
        count = min(trees.most_virtual(budget), budget - len(tree))
        chances = [dict(zip(tokens, probs, strict=True)) for tokens, probs in self._levels(context, memory)]
        values: list[float] = []
        for token, parent, depth in zip(tree.tokens, tree.parents, tree.depths, strict=True):
            values.append((1.0 if parent == ROOT else values[parent]) * chances[depth - 1][token])
        placed = trees.placed(ends(tree.parents, values), budget, count)
        deepest: dict[int, int] = {}  # node: its number of positions
        latest: dict[int, Sequence[int]] = {}  # node: its virtual nodes at the deepest position
        numbers: list[int] = []
        parents: list[int] = []
        for node, _ in placed:
            position = deepest.get(node, 0)
            deepest[node] = position + 1
            parents += latest.get(node, [node] * trees.ensemble)
            latest[node] = range(len(tree) + len(numbers), len(tree) + len(numbers) + trees.ensemble)
            numbers += range(position * trees.ensemble, (position + 1) * trees.ensemble)
        return VirtualNodes(len(tree), numbers, parents)

    def observe_virtual(self, memory: HeadMemory, context: Context, numbers: Sequence[int], logits: Tensor) -> None:
        """Keep the most probable tokens of each position."""
        ensemble = self.trees(memory).ensemble
        assert list(numbers) == list(range(len(numbers))), numbers
        if not numbers:
            context.state.pop(self, None)
            return
        # The mean of logits over a position's tokens.
        mean = logits.float().view(-1, ensemble, logits.shape[-1]).mean(1)
        probs, tokens = mean.softmax(-1).topk(self.branches, -1)
        levels = list(zip(tokens.tolist(), probs.tolist(), strict=True))
        context.state[self] = _Levels(len(context.tokens), levels)
