"""SentenceKV: sentences are read whole whose mean key agrees with the mean query of the sentence being written.

Source: Zhu et al. 2025, arXiv:2504.00970, and its code: SnapKV keeps a multiple of what is read, in the host's memory;
the first and the last tokens are always read. Departs from it: SnapKV is applied while decoding, too, so that what is
held stays bounded; lines end as sentences do, and long sentences are cut, since code and lists have few full stops; the
first token of a sentence reads as much as the others; the query heads of a KV head choose together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.evict.base import candidates
from hasten.accel.cache.evict.snapkv import SnapKV
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.offloaded import Offloaded, to_host
from hasten.accel.cache.segments.selected import tokens_of_groups
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring


@dataclass(frozen=True)
class Sentences(Offloaded):
    """numbers: (H, T) int32, the sentence of each token. means: (H, S, D), mean key of each, by the order of numbers.

    of_tokens: (H, T) int32, place of each token's sentence in means. sinks: tokens at first positions, read first.
    """

    numbers: Tensor
    means: Tensor
    of_tokens: Tensor
    sinks: int

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, positions: Tensor, numbers: Tensor, budget: int, sinks: int
    ) -> "Sentences":
        """The segment of keys and values (H, T, D)."""
        own, places = numbers.unique(return_inverse=True)
        index = places[..., None].expand(-1, -1, keys.shape[2])
        sums = torch.zeros(len(keys), len(own), keys.shape[2], device=keys.device).scatter_add_(1, index, keys.float())
        counts = torch.zeros(sums.shape[:2], device=keys.device).scatter_add_(
            1, places, torch.ones_like(keys[..., 0]).float()
        )
        means = (sums / counts.clamp(min=1)[..., None]).to(keys.dtype)
        return cls(to_host(keys), to_host(values), positions, budget, numbers, means, places.int(), sinks)

    def tensors(self) -> Iterator[Tensor]:
        """Keys, values and what is known of sentences."""
        yield from super().tensors()
        yield from (self.numbers, self.means, self.of_tokens)

    def choose(self, queries: Tensor, scoring: Scoring) -> Tensor:
        """The first tokens, and those of the sentences with the largest product of mean key and guide."""
        products = self.guides_of_heads() @ self.means.float().mT  # (H, W, S)
        ranks = torch.nn.functional.pad(products, (0, 1), value=torch.inf)
        groups = torch.where(self.positions < self.sinks, self.means.shape[1], self.of_tokens)
        return tokens_of_groups(ranks, groups, self.budget)


@dataclass(frozen=True)
class SentenceKV(CacheMethod):
    """Retriever of sentences. A query reads `budget` tokens, the first `sinks` among them, and the `recent` last ones.

    held: multiple of the budget that is held, by the attention of the last `window` queries, pooled over `kernel`
    tokens. longest: tokens of a sentence, which is cut there; all sentences are so long where no tokenizer tells their
    ends. A mean query is of the last `window` tokens of the sentence at most.
    """

    held: float = 5.0
    sinks: int = 32
    recent: int = 32
    window: int = 32
    kernel: int = 7
    longest: int = 64

    frees: ClassVar[bool] = False
    guided: ClassVar[bool] = True
    reads_ends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.held < 1:
            raise UserError(f"cache.held={self.held} is out of range: 1 or more")
        if self.longest < 1:
            raise UserError(f"cache.longest={self.longest} is out of range: 1 or more")
        self._evictor()

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def guide(self, queries: Tensor, seen: Tensor, ends: Tensor | None) -> Tensor:
        """Mean query of the current sentence up to each query."""
        assert ends is not None
        place = torch.arange(len(queries), device=queries.device)
        own = torch.where(seen, place, -1).amax(1, keepdim=True)
        ended = torch.where(seen & ends & (place < own), place, -1).amax(1, keepdim=True)
        current = (seen & (place > ended)).float()
        means = current @ queries.flatten(1).float() / current.sum(1, keepdim=True)
        return means.view(-1, *queries.shape[1:])

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """One segment of the sentences of all tokens but the last ones.

        The memory is the number of the sentence behind them, and how many of its tokens are among them.
        """
        assert place.budget is not None
        assert recent.ends is not None
        last = min(self.recent, recent.keys.shape[1])
        tokens = candidates(segments, recent, place)
        count = tokens.positions.shape[1] - last
        if count < 1:
            return None
        new, memory = numbered(recent.ends[: recent.keys.shape[1] - last], self.longest, *(recent.memory or (0, 0)))
        before = [segment.numbers for segment in segments if isinstance(segment, Sentences)]
        numbers = torch.cat([*before, new.expand(len(recent.keys), -1)], 1)
        most = max(ceil(self.held * place.budget), self.sinks + last + 1)
        keys, values, positions = (part[:, :count] for part in (tokens.keys, tokens.values, tokens.positions))
        if count + last > most:
            holding = replace(tokens, place=replace(place, budget=most))
            kept = self._evictor().choose(holding, most)[:, : most - last]
            keys, values, positions = tokens.gathered(kept)
            numbers = numbers.gather(1, kept)
        # Copied, so that what is not kept is freed.
        keys, values, positions = (part.clone() for part in (keys, values, positions))
        return Kept([Sentences.of(keys, values, positions, numbers, place.budget, self.sinks)], last, memory=memory)

    def _evictor(self) -> SnapKV:
        return SnapKV(self.sinks, self.recent, self.window, self.kernel, pooling="max")


def numbered(ends: Tensor, longest: int, number: int, length: int) -> tuple[Tensor, tuple[int, int]]:
    """Sentence (T,) int32 of each token, from `number` on, and number and length of the one behind the last token.

    ends: (T,) bool. length: tokens of the first sentence that were before.
    """
    count = len(ends)
    place = torch.arange(count, device=ends.device)
    # Where the sentence of each token began: behind the last end before it.
    ended = torch.where(ends, place + 1, -length).roll(1)
    ended[:1] = -length
    within = place - ended.cummax(0).values
    begins = (within % longest == 0) & ((place > 0) | (length > 0))
    numbers = number + begins.int().cumsum(0)
    if not count:
        return numbers.int(), (number, length)
    final, size = int(numbers[-1]), int(within[-1]) + 1
    return numbers.int(), (final + 1, 0) if bool(ends[-1]) else (final, size)
