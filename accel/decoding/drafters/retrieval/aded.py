"""ADED: a trigram matrix that is updated while decoding, and a search for the draft tree in it.

Source: Liu et al. 2024, arXiv:2407.12021; the details are those of its code, github.com/liuxukun2000/Adaptix.
Departs from it: a best-first search is the default, beside the paper's Monte Carlo tree search; the search fills the
budget of nodes exactly, where the paper drops long paths until the tree fits; the matrix also learns the prompt, and
its size is bounded.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf, log, sqrt
from operator import itemgetter

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.drafters.best_first import best_first
from hasten.accel.decoding.drafters.retrieval.recent_rows import RecentRows
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.errors import UserError

SEARCHES = ("best_first", "mcts")

Pair = tuple[int, ...]


@dataclass
class Trigrams:
    """scores: for each pair of tokens its successors with their scores; pairs in the order of their latest update."""

    scores: RecentRows[Pair, dict[int, float]] = field(default_factory=RecentRows)


@dataclass(slots=True)
class _Node:
    """A node of the tree search. pair: the last two tokens of its path. prior: score of the last token.

    value: sum of the scores of the roll-outs through it.
    """

    pair: Pair
    parent: "_Node | None" = None
    prior: float = 0.0
    visits: int = 0
    value: float = 0.0
    children: "list[_Node]" = field(default_factory=list)


@dataclass(frozen=True)
class Aded(Drafter):
    """Drafter without a model; `learn` builds its matrix from text, and decoding updates it.

    search: `mcts` is the paper's search with `iterations` iterations and the exploration weights c1 and c2;
    `best_first` takes the nodes with the largest product of relative scores. length: maximum depth. window, step, cap:
    after every pass the score of each trigram in the last `window` tokens grows by `step`, up to `cap`. learns_prompt:
    whether prompts update the matrix like decoded text. successors: number kept of each pair; the one with the lowest
    score is dropped. max_pairs: number of pairs; the least recently updated one is dropped.
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
                self._increase(memory, pair, token, count / total, inf)

    def begin(self, context: Context, memory: Trigrams) -> None:
        """Learn the prompt, or only its end, as the paper does."""
        tokens = context.tokens
        if self.learns_prompt:
            # A window that moves by one token covers each trigram this many times.
            self._count(memory, tokens[: -self.window + 2], (self.window - 2) * self.step)
        self._count(memory, tokens[-self.window :], self.step)

    def observe(self, memory: Trigrams, outcome: Outcome) -> None:
        """Increase the scores of the trigrams in the last tokens, including those just committed."""
        self._count(memory, [*outcome.context.tokens[-self.window :], *outcome.committed][-self.window :], self.step)

    def propose(self, context: Context, memory: Trigrams, budget: int) -> DraftTree:
        """The tree that the search finds after the last two tokens; empty if this pair is new."""
        tokens = context.tokens
        if len(tokens) < 2 or (tokens[-2], tokens[-1]) not in memory.scores:
            return DraftTree()
        pair = tokens[-2], tokens[-1]
        if self.search == "best_first":
            return self._best_first(memory, pair, budget)
        return self._most_visited(memory, pair, budget, context.draft_generator)

    def saved(self, memory: Trigrams) -> Mapping[str, Tensor]:
        """pairs (P, 2), counts (P,) of their successors; tokens (S,) and scores (S,) float64 of all successors."""
        return self._tensors(memory.scores)

    def changes(self, memory: Trigrams, whole: bool = False) -> Mapping[str, Tensor]:
        """The rows of the pairs that were updated since the last call, in the form of `saved`."""
        return self._tensors(memory.scores.changes(whole))

    def _tensors(self, scores: Mapping[Pair, dict[int, float]]) -> Mapping[str, Tensor]:
        rows = scores.values()
        return {
            "pairs": torch.tensor(list(scores), dtype=torch.long).view(-1, 2),
            "counts": torch.tensor([len(row) for row in rows], dtype=torch.long),
            "tokens": torch.tensor([token for row in rows for token in row], dtype=torch.long),
            "scores": torch.tensor([score for row in rows for score in row.values()], dtype=torch.float64),
        }

    def load(self, memory: Trigrams, tensors: Mapping[str, Tensor]) -> None:
        """Restore the matrix."""
        memory.scores.clear()
        self.update(memory, tensors)

    def update(self, memory: Trigrams, tensors: Mapping[str, Tensor]) -> None:
        """Replace the rows of some pairs."""
        entries = zip(tensors["tokens"].tolist(), tensors["scores"].tolist(), strict=True)
        for (first, second), count in zip(tensors["pairs"].tolist(), tensors["counts"].tolist(), strict=True):
            memory.scores.put((first, second), dict(next(entries) for _ in range(count)), self.max_pairs)

    def _count(self, memory: Trigrams, tokens: Sequence[int], step: float) -> None:
        for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
            self._increase(memory, (first, second), third, step, self.cap)

    def _increase(self, memory: Trigrams, pair: Pair, token: int, step: float, cap: float) -> None:
        row = memory.scores.get(pair)
        if row is None:
            memory.scores.put(pair, {token: min(step, cap)}, self.max_pairs)
            return
        memory.scores.put(pair, row, self.max_pairs)
        before = row.get(token, 0.0)
        row[token] = max(before, min(before + step, cap))
        if len(row) > self.successors:
            # The newest successor is kept: otherwise its score could never grow.
            del row[min((other for other in row if other != token), key=row.__getitem__)]

    def _best_first(self, memory: Trigrams, pair: Pair, budget: int) -> DraftTree:
        nodes = best_first(pair, lambda tail: _relative_scores(memory, tail), budget, self.length)
        labels = [_label(*node) for node in zip(nodes.probs, nodes.ranks, nodes.depths, strict=True)]
        return DraftTree(nodes.tokens, nodes.parents, labels=labels)

    def _most_visited(self, memory: Trigrams, pair: Pair, budget: int, generator: torch.Generator) -> DraftTree:
        """The nodes that the paper's search visits most often, each followed by its most probable successor."""
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
        for node, path in prefixes:  # the list grows during the loop: breadth first
            prefixes += [(child, (*path, child.pair[1])) for child in node.children]
        # Sorting is stable, and no node has more visits than its parent: parents stay before their children.
        for node, path in sorted(prefixes, key=lambda item: -item[0].visits):
            if len(tokens) == budget:
                break
            if node.parent is not None:
                row = _relative_scores(memory, node.parent.pair)
                rank = next(rank for rank, (token, _) in enumerate(row) if token == path[-1])
                add(path, rank, row[rank][1])
            if node.pair in memory.scores:
                token, share = _relative_scores(memory, node.pair)[0]
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
            ancestor: _Node | None = node
            while ancestor is not None:  # back-up
                ancestor.visits += 1
                ancestor.value += value
                ancestor = ancestor.parent
        return root

    def _select(self, node: _Node) -> _Node:
        """The first child without a visit; if all have been visited, the one with the highest upper bound."""
        weight = (self.c1 + log((node.visits + self.c2 + 1) / self.c2)) * sqrt(node.visits)
        best, highest = node.children[0], -inf
        for child in node.children:
            if not child.visits:
                return child
            bound = child.value / child.visits + weight * child.prior / (1 + child.visits)
            if bound > highest:
                best, highest = child, bound
        return best


def _relative_scores(memory: Trigrams, pair: tuple[int, ...]) -> list[tuple[int, float]]:
    """Successors of a pair with their scores divided by the sum of its scores, largest first; empty for a new pair."""
    row = memory.scores.get(pair)
    if row is None:
        return []
    total = sum(row.values())
    return sorted([(token, score / total) for token, score in row.items()], key=itemgetter(1), reverse=True)


def _label(share: float, rank: int, depth: int) -> tuple[str, int, int, int]:
    """Class of a node for the estimate of its acceptance: capped rank, depth and -log2 of its relative score."""
    return "aded", min(rank, 3), min(depth, 4), min(int(-log(share, 2)), 4)
