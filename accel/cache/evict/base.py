"""Base class of evictors: tokens with the lowest scores are dropped, in each head its own."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Candidates:
    """Tokens of which some are dropped.

    keys, values: (H, T, D). positions: (H, T) int32. queries, attention: see Recent.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor | None
    attention: Tensor | None
    place: Place


@dataclass(frozen=True)
class Evictor(CacheMethod):
    """Evictor of tokens by score. sinks: first tokens, recent: last tokens that are always kept."""

    sinks: int = 4
    recent: int = 16

    def __post_init__(self) -> None:
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: 0 or more")

    @abstractmethod
    def score(self, tokens: Candidates) -> Tensor:
        """Importance (H, T) float32 of each token."""

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """The `budget` tokens of each head with the highest scores, in their order, sinks and last tokens with them."""
        assert place.budget is not None
        heads = len(recent.keys)
        older = [segment.dense() for segment in segments]
        own = recent.keys, recent.values, recent.positions.expand(heads, -1)
        keys, values, positions = (torch.cat(parts, 1) for parts in zip(*older, own, strict=True))
        count = keys.shape[1]
        if count <= place.budget:
            return None
        scores = self.score(Candidates(keys, values, positions, recent.queries, recent.attention, place)).clone()
        assert scores.shape == positions.shape, (type(self).__name__, scores.shape)
        sinks = positions < min(self.sinks, place.budget)
        # Where the budget is too small for both, there are fewer last tokens.
        recent_tokens = min(self.recent, place.budget - int(sinks[0].sum()))
        scores.clamp_(max=torch.finfo(scores.dtype).max).masked_fill_(sinks, torch.inf)
        scores[:, count - recent_tokens :] = torch.inf
        # Of equal scores the later token is kept: a stable order, whatever the sort does with ties.
        order = scores.flip(1).sort(dim=1, descending=True, stable=True).indices
        kept = (count - 1 - order[:, : place.budget]).sort(1).values
        gathered = [part.gather(1, kept[..., None].expand(-1, -1, part.shape[2])) for part in (keys, values)]
        return Kept([Dense(*gathered, positions.gather(1, kept))], 0, kept)
