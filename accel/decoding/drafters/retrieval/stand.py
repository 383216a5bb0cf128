"""STAND: a table of n-grams with the target's probabilities after them; drafts are drawn without replacement.

Source: Song et al. 2025, arXiv:2506.04708.
Departs from it: the shape of the tree is not fitted to maths problems, but is the one with the highest expected
acceptance at fixed acceptance rates by rank; noise is drawn on demand; the size of the table is bounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.drafters.retrieval.recent_rows import RecentRows
from hasten.accel.decoding.drafters.template import by_acceptance, most_accepted
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.errors import UserError

_SUCCESSORS = 10  # kept of an n-gram
_MIN_WEIGHT = 1e-12  # relative to the most probable successor; less likely ones are never drawn

# Acceptance rate of a node by its rank, given that its parent is accepted: between the rates measured on text and on
# greedy output for HumanEval.
_RATES = (0.55, 0.1, 0.05, 0.03, 0.02)
_TOPOLOGY = by_acceptance(most_accepted(80, _RATES, depth=10), _RATES)

NGram = tuple[int, ...]


@dataclass(slots=True)
class _Entry:
    """probs: by token, the average of the target's probabilities, most probable first. visits: passes averaged."""

    visits: int
    probs: dict[int, float]


@dataclass
class NGrams:
    """entries: successors of each n-gram, in the order of their latest update. vocabulary: V."""

    vocabulary: int
    entries: RecentRows[NGram, _Entry] = field(default_factory=RecentRows)


@dataclass(frozen=True)
class Stand(Drafter):
    """Drafter without a model; it looks up the longest known n-gram of min_ngram to max_ngram tokens at the end.

    learns_rejected: whether it learns n-grams of rejected nodes as well. max_ngrams: number of n-grams kept; the least
    recently updated one is dropped.
    """

    max_ngram: int = 4
    min_ngram: int = 2
    learns_rejected: bool = False
    max_ngrams: int = 100_000
    observes: ClassVar[int] = _SUCCESSORS

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise UserError(f"min_ngram={self.min_ngram} must be from 1 to max_ngram={self.max_ngram}")
        if self.max_ngrams < 1:
            raise UserError(f"max_ngrams={self.max_ngrams} must be 1 or more")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Draws without replacement; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def new_memory(self, models: Models) -> NGrams:
        """An empty table."""
        return NGrams(models.vocabulary)

    def propose(self, context: Context, memory: NGrams, budget: int) -> DraftTree:
        """The first nodes of the tree's topology for which the table has tokens.

        The request's temperature is applied to the table's probabilities; its top-k, top-p and penalty are not.
        """
        greedy = context.drafting.is_greedy
        tokens: list[int] = []
        parents: list[int] = []
        labels: list[tuple[str, int, int, int]] = []
        nodes = [ROOT]  # node of ROOT, then of each place of the topology; ROOT where a place is empty
        tails: dict[int, NGram] = {ROOT: tuple(context.tokens[-self.max_ngram :])}
        below: dict[int, tuple[int, list[int]]] = {}
        probs: dict[int, dict[int, float]] = {}
        noise: list[float] = []
        if not greedy:
            noise = torch.empty(budget * _SUCCESSORS).exponential_(generator=context.draft_generator).tolist()
        for parent, path in _TOPOLOGY:
            above, rank = nodes[parent + 1], path[-1]
            if above == ROOT and parent != ROOT:  # the parent's place is empty
                nodes.append(ROOT)
                continue
            if above not in below:
                n, row = self._longest_match(memory, tails[above])
                if row and not greedy:
                    probs[above] = row = _with_temperature(row, context.sampling.temperature)
                    start = (above + 1) * _SUCCESSORS
                    below[above] = n, _draw_order(row, noise[start : start + _SUCCESSORS])
                else:
                    below[above] = n, list(row)
            n, candidates = below[above]
            if rank >= len(candidates):
                nodes.append(ROOT)
                continue
            node = len(tokens)
            nodes.append(node)
            tokens.append(candidates[rank])
            parents.append(above)
            labels.append(("stand", n, rank, min(len(path), 4)))
            tails[node] = (*tails[above], candidates[rank])[-self.max_ngram :]
            if len(tokens) == budget:
                break
        if greedy:
            return DraftTree(tokens, parents, labels=labels)
        full = _dense({parent: probs[parent] for parent in set(parents)}, memory.vocabulary)
        return DraftTree(tokens, parents, DraftSampling.WITHOUT_REPLACEMENT, full, labels=labels)

    def observe(self, memory: NGrams, outcome: Outcome) -> None:
        """Average the target's probabilities into the entries of the n-grams before each new token."""
        assert outcome.top_tokens is not None
        assert outcome.top_probs is not None
        tree = outcome.tree
        top_tokens, top_probs = outcome.top_tokens.tolist(), outcome.top_probs.tolist()
        tails: dict[int, NGram] = {ROOT: tuple(outcome.context.tokens[-self.max_ngram :])}
        for node in [ROOT, *range(len(tree))] if self.learns_rejected else outcome.decided:
            if node != ROOT:
                tails[node] = (*tails[tree.parents[node]], tree.tokens[node])[-self.max_ngram :]
            tail = tails[node]
            for n in range(self.min_ngram, min(self.max_ngram, len(tail)) + 1):
                self._average(memory, tail[-n:], top_tokens[node + 1], top_probs[node + 1])

    def saved(self, memory: NGrams) -> Mapping[str, Tensor]:
        """ngrams (N, n) and tokens (N, 10) int64, padded with -1; visits (N,); probs (N, 10) float64, padded with 0."""
        return self._tensors(memory.entries)

    def changes(self, memory: NGrams, whole: bool = False) -> Mapping[str, Tensor]:
        """The entries that were updated since the last call, in the form of `saved`."""
        return self._tensors(memory.entries.changes(whole))

    def _tensors(self, entries: Mapping[NGram, _Entry]) -> Mapping[str, Tensor]:
        rows = entries.values()
        return {
            "ngrams": _pad(list(entries), self.max_ngram, -1),
            "visits": torch.tensor([row.visits for row in rows], dtype=torch.long),
            "tokens": _pad([list(row.probs) for row in rows], _SUCCESSORS, -1),
            "probs": _pad([list(row.probs.values()) for row in rows], _SUCCESSORS, 0.0),
        }

    def load(self, memory: NGrams, tensors: Mapping[str, Tensor]) -> None:
        """Restore the table."""
        memory.entries.clear()
        self.update(memory, tensors)

    def update(self, memory: NGrams, tensors: Mapping[str, Tensor]) -> None:
        """Replace the entries of some n-grams."""
        columns = (tensors[name].tolist() for name in ("ngrams", "visits", "tokens", "probs"))
        for ngram, visits, tokens, probs in zip(*columns, strict=True):
            row = {token: prob for token, prob in zip(tokens, probs, strict=True) if token >= 0}
            memory.entries.put(tuple(token for token in ngram if token >= 0), _Entry(visits, row), self.max_ngrams)

    def _average(self, memory: NGrams, ngram: NGram, ids: list[int], probs: list[float]) -> None:
        row = memory.entries.get(ngram)
        if row is None:
            memory.entries.put(ngram, _Entry(1, dict(zip(ids, probs, strict=True))), self.max_ngrams)
            return
        memory.entries.put(ngram, row, self.max_ngrams)
        row.visits += 1
        share = 1 / row.visits
        mixed = {token: prob * (1 - share) for token, prob in row.probs.items()}
        for token, prob in zip(ids, probs, strict=True):
            mixed[token] = mixed.get(token, 0.0) + prob * share
        row.probs = dict(sorted(mixed.items(), key=itemgetter(1), reverse=True)[:_SUCCESSORS])

    def _longest_match(self, memory: NGrams, tail: NGram) -> tuple[int, dict[int, float]]:
        """Length of the longest known n-gram at the end of `tail`, and its successors; (0, {}) if none is known."""
        for n in range(min(self.max_ngram, len(tail)), self.min_ngram - 1, -1):
            row = memory.entries.get(tail[-n:])
            if row is not None:
                return n, row.probs
        return 0, {}


def _with_temperature(row: Mapping[int, float], temperature: float) -> dict[int, float]:
    """A row's distribution at a temperature, without tokens of negligible probability."""
    highest = max(row.values())
    weights = {token: (prob / highest) ** (1 / temperature) for token, prob in row.items()}
    weights = {token: weight for token, weight in weights.items() if weight > _MIN_WEIGHT}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def _draw_order(row: Mapping[int, float], noise: list[float]) -> list[int]:
    """All tokens of a row in the order of draws without replacement, from exponential noise.

    The Gumbel-top-k trick without logarithms: a token's arrival time is exponential with its probability as the rate.
    """
    times = {token: time / prob for (token, prob), time in zip(row.items(), noise, strict=False)}
    return sorted(times, key=times.__getitem__)


def _dense(rows: Mapping[int, Mapping[int, float]], vocabulary: int) -> dict[int, Tensor]:
    """Dense distributions (V,) float32 of sparse rows; one tensor operation fills all of them."""
    full = torch.zeros(len(rows), vocabulary)
    places = [place * vocabulary + token for place, row in enumerate(rows.values()) for token in row]
    full.view(-1)[torch.tensor(places, dtype=torch.long)] = torch.tensor(
        [prob for row in rows.values() for prob in row.values()]
    )
    return dict(zip(rows, full.unbind(), strict=True))


def _pad(rows: list[NGram] | list[list[int]] | list[list[float]], width: int, filler: float) -> Tensor:
    dtype = torch.long if isinstance(filler, int) else torch.float64
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=dtype).view(-1, width)
