"""EMS: the most important tokens stay, the next ones are merged into the nearest of them, the rest is dropped.

Source: Li et al. 2024, arXiv:2412.08521 (abstract; no code was found). What is our reading: the global score is the
summed attention and the local one that of the last queries, each divided by its mean; the band that is merged is
`merged` times the kept tokens; and the zero class, which absorbs tokens similar to none, has a fixed similarity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.evict.base import Candidates, Evictor, candidates, window_attention
from hasten.accel.cache.merge.d2o import others, weighted_mean
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class EMS(Evictor):
    """Evictor by global and local attention that merges the next band of tokens.

    window: last queries of the local score. merged: tokens that are merged for each kept one. similarity: cosine of
    keys below which a token is dropped.
    """

    window: int = 32
    merged: float = 1.0
    similarity: float = 0.6

    sums_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise UserError(f"cache.window={self.window} is out of range: 1 or more")
        if self.merged < 0:
            raise UserError(f"cache.merged={self.merged} is out of range: 0 or more")
        if not -1 <= self.similarity <= 1:
            raise UserError(f"cache.similarity={self.similarity} is out of range: a cosine, -1 to 1")

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def score(self, tokens: Candidates) -> Tensor:
        """Sum of both scores."""
        assert tokens.attention is not None
        parts = tokens.attention, window_attention(tokens)
        return sum((part / part.mean(1, keepdim=True) for part in parts), torch.zeros_like(parts[0]))

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Kept tokens, with those of the band merged into them."""
        assert place.budget is not None
        tokens = candidates(segments, recent, place)
        count = tokens.positions.shape[1]
        if count <= place.budget:
            return None
        kept = self.choose(tokens, place.budget)
        rest = others(kept, count)
        band = min(int(self.merged * place.budget), rest.shape[1])
        best = self.score(tokens).gather(1, rest).sort(dim=1, descending=True, stable=True).indices[:, :band]
        old_keys, old_values, _ = tokens.gathered(rest.gather(1, best))
        keys, values, positions = tokens.gathered(kept)
        similarity = F.normalize(old_keys.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).mT
        nearest, target = similarity.max(-1) if band else (similarity.new_zeros(len(kept), 0), best)
        weight = (nearest >= self.similarity).float()
        keys, values = (
            weighted_mean(new, old, weight, target) for new, old in ((keys, old_keys), (values, old_values))
        )
        return Kept([Dense(keys, values, positions)], 0, kept)
