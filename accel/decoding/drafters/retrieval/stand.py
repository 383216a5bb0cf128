"""STAND: a table of n-grams with the target's own probabilities behind them, drawn from without replacement.

Source: Song et al. 2025, arXiv:2506.04708.
Departs from it: the shape of the tree is not fitted to maths problems, it is the likeliest one for fixed rates of
acceptance by rank; noise is drawn when it is needed; the table is bounded.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.drafters.template import likeliest, ordered
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.errors import UserError

_KEPT = 10  # successors of an n-gram
_LEAST = 1e-12  # of the likeliest one's weight

# How often a node of each rank is accepted if its parent is; between what text and greedy output gave on HumanEval.
_RATES = (0.55, 0.1, 0.05, 0.03, 0.02)
_TOPOLOGY = ordered(likeliest(80, _RATES, depth=10), _RATES)

NGram = tuple[int, ...]


@dataclass(slots=True)
class _Seen:
    """visits: passes that probs are the average of, by token, the likeliest first."""

    visits: int
    probs: dict[int, float]


@dataclass
class NGrams:
    """seen: by n-gram, what followed; the one seen last stands last. vocabulary: V."""

    vocabulary: int
    seen: OrderedDict[NGram, _Seen] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class Stand(Drafter):
    """Drafter without a model; it goes by the last max_ngram tokens if it has seen them, else by fewer.

    learns_rejected: whether n-grams of rejected nodes are learned as well. max_ngrams: how many n-grams are kept; those
    not seen for longest go.
    """

    max_ngram: int = 4
    min_ngram: int = 2
    learns_rejected: bool = False
    max_ngrams: int = 100_000
    observes: ClassVar[int] = _KEPT

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise UserError(f"min_ngram={self.min_ngram} must be from 1 to max_ngram={self.max_ngram}")
        if self.max_ngrams < 1:
            raise UserError(f"max_ngrams={self.max_ngrams} must be 1 or more")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Drawn one after the other from what is left, unless there is nothing to draw."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def new_memory(self, models: Models) -> NGrams:
        """An empty table."""
        return NGrams(models.vocabulary)

    def propose(self, context: Context, memory: NGrams, budget: int) -> DraftTree:
        """The topology's first nodes that the table has tokens for.

        Of the request's sampling its temperature acts on the table's probabilities.
        """
        greedy = context.sampling.is_greedy
        tokens: list[int] = []
        parents: list[int] = []
        labels: list[tuple[str, int, int, int]] = []
        nodes = [ROOT]  # of ROOT, then by place in the topology
        tails: dict[int, NGram] = {ROOT: tuple(context.tokens[-self.max_ngram :])}
        below: dict[int, tuple[int, list[int]]] = {}
        probs: dict[int, dict[int, float]] = {}
        noise: list[float] = []
        if not greedy:
            noise = torch.empty(budget * _KEPT).exponential_(generator=context.draft_generator).tolist()
        for parent, path in _TOPOLOGY:
            above, rank = nodes[parent + 1], path[-1]
            if above == ROOT and parent != ROOT:  # the parent is not there
                nodes.append(ROOT)
                continue
            if above not in below:
                n, row = self._known(memory, tails[above])
                if row and not greedy:
                    probs[above] = row = _tempered(row, context.sampling.temperature)
                    start = (above + 1) * _KEPT
                    below[above] = n, _drawn(row, noise[start : start + _KEPT])
                else:
                    below[above] = n, list(row)
            n, found = below[above]
            if rank >= len(found):
                nodes.append(ROOT)
                continue
            node = len(tokens)
            nodes.append(node)
            tokens.append(found[rank])
            parents.append(above)
            labels.append(("stand", n, rank, min(len(path), 4)))
            tails[node] = (*tails[above], found[rank])[-self.max_ngram :]
            if len(tokens) == budget:
                break
        if greedy:
            return DraftTree(tokens, parents, labels=labels)
        full = _full({parent: probs[parent] for parent in set(parents)}, memory.vocabulary)
        return DraftTree(tokens, parents, DraftSampling.WITHOUT_REPLACEMENT, full, labels=labels)

    def observe(self, memory: NGrams, outcome: Outcome) -> None:
        """Average the target's probabilities into every n-gram of the text that grew."""
        assert outcome.top_tokens is not None
        assert outcome.top_probs is not None
        tree = outcome.tree
        top_tokens, top_probs = outcome.top_tokens.tolist(), outcome.top_probs.tolist()
        tails: dict[int, NGram] = {ROOT: tuple(outcome.context.tokens[-self.max_ngram :])}
        for node in [ROOT, *(range(len(tree)) if self.learns_rejected else outcome.path)]:
            if node != ROOT:
                tails[node] = (*tails[tree.parents[node]], tree.tokens[node])[-self.max_ngram :]
            tail = tails[node]
            for n in range(self.min_ngram, min(self.max_ngram, len(tail)) + 1):
                self._average(memory, tail[-n:], top_tokens[node + 1], top_probs[node + 1])

    def saved(self, memory: NGrams) -> Mapping[str, Tensor]:
        """ngrams (N, n) and tokens (N, 10) int64, -1 where there is none; visits (N,), probs (N, 10) float64."""
        rows = memory.seen.values()
        return {
            "ngrams": _padded(list(memory.seen), self.max_ngram, -1),
            "visits": torch.tensor([row.visits for row in rows], dtype=torch.long),
            "tokens": _padded([list(row.probs) for row in rows], _KEPT, -1),
            "probs": _padded([list(row.probs.values()) for row in rows], _KEPT, 0.0),
        }

    def load(self, memory: NGrams, tensors: Mapping[str, Tensor]) -> None:
        """Put the table back."""
        memory.seen.clear()
        columns = (tensors[name].tolist() for name in ("ngrams", "visits", "tokens", "probs"))
        for ngram, visits, tokens, probs in zip(*columns, strict=True):
            row = {token: prob for token, prob in zip(tokens, probs, strict=True) if token >= 0}
            memory.seen[tuple(token for token in ngram if token >= 0)] = _Seen(visits, row)

    def _average(self, memory: NGrams, ngram: NGram, ids: list[int], probs: list[float]) -> None:
        row = memory.seen.get(ngram)
        if row is None:
            memory.seen[ngram] = _Seen(1, dict(zip(ids, probs, strict=True)))
            if len(memory.seen) > self.max_ngrams:
                memory.seen.popitem(last=False)
            return
        memory.seen.move_to_end(ngram)
        row.visits += 1
        share = 1 / row.visits
        found = {token: prob * (1 - share) for token, prob in row.probs.items()}
        for token, prob in zip(ids, probs, strict=True):
            found[token] = found.get(token, 0.0) + prob * share
        row.probs = dict(sorted(found.items(), key=itemgetter(1), reverse=True)[:_KEPT])

    def _known(self, memory: NGrams, tail: NGram) -> tuple[int, dict[int, float]]:
        """Length of the longest n-gram that was seen, and what followed it; nothing where none was."""
        for n in range(min(self.max_ngram, len(tail)), self.min_ngram - 1, -1):
            row = memory.seen.get(tail[-n:])
            if row is not None:
                return n, row.probs
        return 0, {}


def _tempered(row: Mapping[int, float], temperature: float) -> dict[int, float]:
    """The distribution of a row at a temperature, without tokens that are next to impossible there."""
    highest = max(row.values())
    weights = {token: (prob / highest) ** (1 / temperature) for token, prob in row.items()}
    weights = {token: weight for token, weight in weights.items() if weight > _LEAST}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def _drawn(row: Mapping[int, float], noise: list[float]) -> list[int]:
    """All tokens of a row in the order of draws without replacement, by exponential noise.

    The Gumbel-top-k trick without logarithms: the order of arrival where a token's rate is its probability.
    """
    times = {token: time / prob for (token, prob), time in zip(row.items(), noise, strict=False)}
    return sorted(times, key=times.__getitem__)


def _full(rows: Mapping[int, Mapping[int, float]], vocabulary: int) -> dict[int, Tensor]:
    """Rows as distributions (V,) float32, made all at once."""
    full = torch.zeros(len(rows), vocabulary)
    places = [place * vocabulary + token for place, row in enumerate(rows.values()) for token in row]
    full.view(-1)[torch.tensor(places, dtype=torch.long)] = torch.tensor(
        [prob for row in rows.values() for prob in row.values()]
    )
    return dict(zip(rows, full.unbind(), strict=True))


def _padded(rows: list[NGram] | list[list[int]] | list[list[float]], width: int, filler: float) -> Tensor:
    dtype = torch.long if isinstance(filler, int) else torch.float64
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=dtype).view(-1, width)
