"""ADED: a matrix of trigrams that adapts while it decodes, and a search in it for the tree to draft.

Source: Liu et al. 2024, arXiv:2407.12021; the details are those of its code, github.com/liuxukun2000/Adaptix.
Departs from it: next to the paper's Monte Carlo tree search there is a best-first search, which is the default; the
search gives a tree of exactly the nodes asked for, where the paper drops long paths until they fit; the matrix also
learns the prompt, and is bounded.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate
from math import inf, log, sqrt

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.errors import UserError

SEARCHES = ("best_first", "mcts")

Pair = tuple[int, int]


@dataclass
class Trigrams:
    """scores: by two tokens, those that followed with their scores; the pair that was seen last stands last."""

    scores: OrderedDict[Pair, dict[int, float]] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _Node:
    """A node of the search: the last two tokens of its path, and the score of the last after those before it."""

    pair: Pair
    parent: "_Node | None" = None
    prior: float = 0.0
    visits: int = 0
    value: float = 0.0
    children: "list[_Node]" = field(default_factory=list)


@dataclass(frozen=True)
class Aded(Drafter):
    """Drafter without a model; `learn` builds its matrix from text, decoding goes on with it.

    search: `mcts`, the paper's, runs `iterations` iterations with exploration weights c1 and c2; `best_first` takes the
    nodes with the largest product of score shares. length: tokens of the longest path. window, step, cap: after every
    pass each trigram of the last `window` tokens gains a step, up to the cap. learns_prompt: whether prompts count as
    decoded. successors, max_pairs: what is kept of each pair, and pairs at all; the weakest and those not seen for
    longest go.
    """

    search: str = "best_first"
    iterations: int = 150
    c1: float = 32.0
    c2: float = 8.0
    length: int = 4
    window: int = 16
    step: float = 0.04
    cap: float = 3.0
    learns_prompt: bool = True
    successors: int = 12
    max_pairs: int = 200_000

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise UserError(f"search={self.search!r} must be one of {', '.join(SEARCHES)}")
        for name in ("iterations", "successors", "max_pairs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        for name, least in (("length", 2), ("window", 3)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be {least} or more")

    def new_memory(self, models: Models) -> Trigrams:
        """An empty matrix."""
        return Trigrams()

    def learn(self, memory: Trigrams, tokens: Sequence[int]) -> None:
        """Add the normalised trigram frequencies of a text."""
        counts: dict[Pair, Counter[int]] = {}
        for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
            counts.setdefault((first, second), Counter())[third] += 1
        for pair, successors in counts.items():
            total = successors.total()
            for token, count in successors.most_common(self.successors):
                self._raise(memory, pair, token, count / total, inf)

    def begin(self, context: Context, memory: Trigrams) -> None:
        """Learn the prompt, or its end as the paper does."""
        tokens = context.tokens
        if self.learns_prompt:
            # As often as a window that moves on by one token covers a trigram.
            self._count(memory, tokens[: -self.window + 2], (self.window - 2) * self.step)
        self._count(memory, tokens[-self.window :], self.step)

    def observe(self, memory: Trigrams, outcome: Outcome) -> None:
        """Raise the trigrams of the last tokens, those that were just committed among them."""
        self._count(memory, [*outcome.context.tokens[-self.window :], *outcome.committed][-self.window :], self.step)

    def propose(self, context: Context, memory: Trigrams, budget: int) -> DraftTree:
        """What the search finds behind the last two tokens; nothing where they are new."""
        tokens = context.tokens
        if len(tokens) < 2 or (tokens[-2], tokens[-1]) not in memory.scores:
            return DraftTree()
        pair = tokens[-2], tokens[-1]
        if self.search == "best_first":
            return self._best_first(memory, pair, budget)
        return self._most_visited(memory, pair, budget, context.draft_generator)

    def saved(self, memory: Trigrams) -> Mapping[str, Tensor]:
        """pairs (P, 2), counts (P,) of their successors, and these on end: tokens (S,), scores (S,) float64."""
        rows = memory.scores.values()
        return {
            "pairs": torch.tensor(list(memory.scores), dtype=torch.long).view(-1, 2),
            "counts": torch.tensor([len(row) for row in rows], dtype=torch.long),
            "tokens": torch.tensor([token for row in rows for token in row], dtype=torch.long),
            "scores": torch.tensor([score for row in rows for score in row.values()], dtype=torch.float64),
        }

    def load(self, memory: Trigrams, tensors: Mapping[str, Tensor]) -> None:
        """Put the matrix back."""
        entries = zip(tensors["tokens"].tolist(), tensors["scores"].tolist(), strict=True)
        memory.scores.clear()
        for (first, second), count in zip(tensors["pairs"].tolist(), tensors["counts"].tolist(), strict=True):
            memory.scores[first, second] = dict(next(entries) for _ in range(count))

    def _count(self, memory: Trigrams, tokens: Sequence[int], step: float) -> None:
        for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
            self._raise(memory, (first, second), third, step, self.cap)

    def _raise(self, memory: Trigrams, pair: Pair, token: int, step: float, cap: float) -> None:
        row = memory.scores.get(pair)
        if row is None:
            memory.scores[pair] = {token: min(step, cap)}
            if len(memory.scores) > self.max_pairs:
                memory.scores.popitem(last=False)
            return
        memory.scores.move_to_end(pair)
        before = row.get(token, 0.0)
        row[token] = max(before, min(before + step, cap))
        if len(row) > self.successors:
            # Never the newest, which would have no chance to gain on the others.
            del row[min((other for other in row if other != token), key=row.__getitem__)]

    def _best_first(self, memory: Trigrams, pair: Pair, budget: int) -> DraftTree:
        tokens: list[int] = []
        parents: list[int] = []
        labels: list[tuple[str, int, int, int]] = []
        # Each entry stands for its later siblings, too, which are no likelier: (-value, age, …).
        heap: list[tuple[float, int, float, list[tuple[int, float]], int, int, Pair, int]] = []

        def put(value: float, parent: int, depth: int, pair: Pair, row: list[tuple[int, float]], rank: int) -> None:
            heappush(heap, (-value * row[rank][1], len(tokens), value, row, rank, parent, pair, depth))

        put(1.0, ROOT, 1, pair, _shares(memory, pair), 0)
        while heap and len(tokens) < budget:
            value, _, above, row, rank, parent, pair, depth = heappop(heap)
            token, share = row[rank]
            node = len(tokens)
            tokens.append(token)
            parents.append(parent)
            labels.append(_label(share, rank, depth))
            if rank + 1 < len(row):
                put(above, parent, depth, pair, row, rank + 1)
            below = pair[1], token
            if depth < self.length and below in memory.scores:
                put(-value, node, depth + 1, below, _shares(memory, below), 0)
        return DraftTree(tokens, parents, labels=labels)

    def _most_visited(self, memory: Trigrams, pair: Pair, budget: int, generator: torch.Generator) -> DraftTree:
        """The nodes that the paper's search visits most, each followed by its likeliest successor."""
        root = self._search(memory, pair, generator)
        tokens: list[int] = []
        parents: list[int] = []
        labels: list[tuple[str, int, int, int]] = []
        places: dict[tuple[int, ...], int] = {(): ROOT}

        def add(path: tuple[int, ...], rank: int, share: float) -> None:
            if path not in places and len(tokens) < budget:
                places[path] = len(tokens)
                tokens.append(path[-1])
                parents.append(places[path[:-1]])
                labels.append(_label(share, rank, len(path)))

        prefixes: list[tuple[_Node, tuple[int, ...]]] = [(root, ())]
        for node, path in prefixes:  # grows while it is walked through: level by level
            prefixes += [(child, (*path, child.pair[1])) for child in node.children]
        # Sorting is stable, and no node is visited more often than its parent: parents stay before children.
        for node, path in sorted(prefixes, key=lambda item: -item[0].visits):
            if len(tokens) == budget:
                break
            if node.parent is not None:
                row = _shares(memory, node.parent.pair)
                rank = next(rank for rank, (token, _) in enumerate(row) if token == path[-1])
                add(path, rank, row[rank][1])
            if node.pair in memory.scores:
                token, share = _shares(memory, node.pair)[0]
                add((*path, token), 0, share)
        return DraftTree(tokens, parents, labels=labels)

    def _search(self, memory: Trigrams, pair: Pair, generator: torch.Generator) -> _Node:
        scores = memory.scores
        root = _Node(pair)
        numbers = iter(torch.rand(self.iterations * self.length, generator=generator).tolist())
        for _ in range(self.iterations):
            node, depth, value = root, 1, 1.0
            while node.children and depth < self.length:  # selection
                node = self._select(node)
                depth += 1
                value += node.prior
            if depth < self.length and node.pair in scores:  # expansion
                node.children = [
                    _Node((node.pair[1], token), node, score) for token, score in scores[node.pair].items()
                ]
                node = node.children[-1]
                depth += 1
                value += node.prior
            last = node.pair
            while depth < self.length and last in scores:  # roll-out
                row = scores[last]
                sums = list(accumulate(row.values()))
                token = list(row)[min(bisect_left(sums, next(numbers) * sums[-1]), len(sums) - 1)]
                last = last[1], token
                depth += 1
                value += row[token]
            above: _Node | None = node
            while above is not None:  # back-up
                above.visits += 1
                above.value += value
                above = above.parent
        return root

    def _select(self, node: _Node) -> _Node:
        """The child with the highest upper bound, the first of those that were not visited yet."""
        weight = (self.c1 + log((node.visits + self.c2 + 1) / self.c2)) * sqrt(node.visits)
        best, highest = node.children[0], -inf
        for child in node.children:
            if not child.visits:
                return child
            bound = child.value / child.visits + weight * child.prior / (1 + child.visits)
            if bound > highest:
                best, highest = child, bound
        return best


def _shares(memory: Trigrams, pair: Pair) -> list[tuple[int, float]]:
    """Successors of a pair, the likeliest first, with their shares of its scores."""
    row = memory.scores[pair]
    total = sum(row.values())
    return sorted([(token, score / total) for token, score in row.items()], key=_share, reverse=True)


def _share(item: tuple[int, float]) -> float:
    return item[1]


def _label(share: float, rank: int, depth: int) -> tuple[str, int, int, int]:
    """Class of a node: its depth, its rank and how often its share can be halved, as far as that tells."""
    return "aded", min(rank, 3), min(depth, 4), min(int(-log(share, 2)), 4)
