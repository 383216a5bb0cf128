"""Shared by drafters that learn the target's probabilities after n-grams: a table of bounded size, and its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.drafters.retrieval.recent_rows import RecentRows
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError

SUCCESSORS = 10  # kept of an n-gram

NGram = tuple[int, ...]


@dataclass(slots=True)
class Entry:
    """probs: by token, the average of the target's probabilities, most probable first. visits: number averaged.

    visits is at most the reciprocal of the least weight of the newest observation, which is the effective number.
    """

    visits: int
    probs: dict[int, float]


@dataclass
class NGramProbs:
    """entries: successors of each n-gram, in the order of their latest update. vocabulary: V."""

    vocabulary: int
    entries: RecentRows[NGram, Entry] = field(default_factory=RecentRows)

    def average(self, ngram: NGram, newest: Entry, newest_share: float, max_ngrams: int) -> None:
        """Average an entry of one visit into that of an n-gram, with the weight newest_share at least."""
        entry = self.entries.get(ngram)
        if entry is None:
            self.entries.put(ngram, newest, max_ngrams)
            return
        visits = entry.visits + 1
        if newest_share:
            visits = min(visits, round(1 / newest_share))
        share = 1 / visits
        mixed = {token: prob * (1 - share) for token, prob in entry.probs.items()}
        for token, prob in newest.probs.items():
            mixed[token] = mixed.get(token, 0.0) + prob * share
        probs = dict(sorted(mixed.items(), key=itemgetter(1), reverse=True)[:SUCCESSORS])
        # A new entry, because n-grams of several lengths share the newest one.
        self.entries.put(ngram, Entry(visits, probs), max_ngrams)


@dataclass(frozen=True)
class NGramDrafter(Drafter):
    """Drafter without a model that learns the target's probabilities after n-grams of min_ngram to max_ngram tokens.

    learns_rejected: whether it learns n-grams of rejected nodes as well. newest_share: the least weight of the newest
    observation in an average; 0 weighs all alike, 1 keeps the newest alone. prompt_tokens: number of tokens at the end
    of a prompt after which it learns the target's probabilities, see `Drafter.observes_prompt`. max_ngrams: number of
    n-grams kept; the least recently updated one is dropped. least_kept: probabilities below it are not stored.
    """

    max_ngram: int
    min_ngram: int
    learns_rejected: bool
    newest_share: float
    prompt_tokens: int
    max_ngrams: int
    observes: ClassVar[int] = SUCCESSORS
    least_kept: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise UserError(f"min_ngram={self.min_ngram} must be from 1 to max_ngram={self.max_ngram}")
        if not 0 <= self.newest_share <= 1:
            raise UserError(f"newest_share={self.newest_share} must be from 0 to 1")
        if self.prompt_tokens < 0:
            raise UserError(f"prompt_tokens={self.prompt_tokens} must be 0 or more")
        if self.max_ngrams < 1:
            raise UserError(f"max_ngrams={self.max_ngrams} must be 1 or more")

    @property
    def observes_prompt(self) -> int:  # type: ignore[override]
        """Equal to `prompt_tokens`."""
        return self.prompt_tokens

    def new_memory(self, models: Models) -> NGramProbs:
        """An empty table."""
        return NGramProbs(models.vocabulary)

    def observe_prompt(
        self, memory: NGramProbs, context: Context, start: int, top_tokens: Tensor, top_probs: Tensor | None
    ) -> None:
        """Average the target's probabilities into the entries of the prompt's n-grams."""
        assert top_probs is not None
        for end, tokens, probs in zip(count(start + 1), top_tokens.tolist(), top_probs.tolist(), strict=False):
            tail = tuple(context.tokens[max(0, end - self.max_ngram) : end])
            self.learn(memory, tail, self._probable(tokens, probs))

    def observe(self, memory: NGramProbs, outcome: Outcome) -> None:
        """Average the target's probabilities into the entries of the n-grams before each new token."""
        assert outcome.top_tokens is not None
        assert outcome.top_probs is not None
        tree = outcome.tree
        top_tokens, top_probs = outcome.top_tokens.tolist(), outcome.top_probs.tolist()
        tails: dict[int, NGram] = {ROOT: tuple(outcome.context.tokens[-self.max_ngram :])}
        for node in [ROOT, *range(len(tree))] if self.learns_rejected else outcome.decided:
            if node != ROOT:
                tails[node] = (*tails[tree.parents[node]], tree.tokens[node])[-self.max_ngram :]
            self.learn(memory, tails[node], self._probable(top_tokens[node + 1], top_probs[node + 1]))

    def learn(self, memory: NGramProbs, tail: NGram, probs: dict[int, float]) -> None:
        """Average probabilities, most probable token first, into the entries of all n-grams at the end of `tail`."""
        newest = Entry(1, probs)
        put = memory.entries.put
        for n in range(self.min_ngram, min(self.max_ngram, len(tail)) + 1):
            if self.newest_share == 1:
                put(tail[-n:], newest, self.max_ngrams)
            else:
                memory.average(tail[-n:], newest, self.newest_share, self.max_ngrams)

    def _probable(self, tokens: Sequence[int], probs: Sequence[float]) -> dict[int, float]:
        """The first token, and all others of the least probability that is kept."""
        least = min(self.least_kept, probs[0])
        return {token: prob for token, prob in zip(tokens, probs, strict=True) if prob >= least}

    def saved(self, memory: NGramProbs) -> Mapping[str, Tensor]:
        """ngrams (N, n) and tokens (N, 10) int64, padded with -1; visits (N,); probs (N, 10) float64, padded with 0."""
        return self._tensors(memory.entries)

    def changes(self, memory: NGramProbs, whole: bool = False) -> Mapping[str, Tensor]:
        """The entries that were updated since the last call, in the form of `saved`."""
        return self._tensors(memory.entries.changes(whole))

    def _tensors(self, entries: Mapping[NGram, Entry]) -> Mapping[str, Tensor]:
        rows = entries.values()
        return {
            "ngrams": _pad(list(entries), self.max_ngram, -1),
            "visits": torch.tensor([row.visits for row in rows], dtype=torch.long),
            "tokens": _pad([list(row.probs) for row in rows], SUCCESSORS, -1),
            "probs": _pad([list(row.probs.values()) for row in rows], SUCCESSORS, 0.0),
        }

    def load(self, memory: NGramProbs, tensors: Mapping[str, Tensor]) -> None:
        """Restore the table."""
        memory.entries.clear()
        self.update(memory, tensors)

    def update(self, memory: NGramProbs, tensors: Mapping[str, Tensor]) -> None:
        """Replace the entries of some n-grams."""
        columns = (tensors[name].tolist() for name in ("ngrams", "visits", "tokens", "probs"))
        for ngram, visits, tokens, probs in zip(*columns, strict=True):
            row = {token: prob for token, prob in zip(tokens, probs, strict=True) if token >= 0}
            memory.entries.put(tuple(token for token in ngram if token >= 0), Entry(visits, row), self.max_ngrams)


def _pad(rows: list[NGram] | list[list[int]] | list[list[float]], width: int, filler: float) -> Tensor:
    dtype = torch.long if isinstance(filler, int) else torch.float64
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=dtype).view(-1, width)
