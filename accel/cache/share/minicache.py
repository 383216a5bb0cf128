"""MiniCache: from the middle of the model on, two layers share the directions of their keys and values.

Source: Liu et al. 2024, arXiv:2405.14366; no code was published, and the formula is also in xKV's repository, where the
condition for tokens of their own keeps the similar ones. Our reading of it: tokens whose angle is within `spread` of
the largest angle keep their own vectors; counted from the least angle, nearly all tokens would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.interpolated import interpolated
from hasten.accel.cache.segments.pair import Pair
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class MiniCache(CacheMethod):
    """Interpolation of pairs of layers, for the tokens of the prompt.

    start: share of the layers that are left as they are. share: of the arc from the upper layer's direction to the
    lower one's. spread: share of the range of angles, from the largest on, in which tokens keep their own vectors.
    recent: last tokens of the prompt that stay as they are.
    """

    start: float = 0.5
    share: float = 0.6
    spread: float = 0.05
    recent: int = 32

    has_budget: ClassVar[bool] = False
    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("start", "share", "spread"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: 0 to 1")
        if self.recent < 0:
            raise UserError(f"cache.recent={self.recent} is out of range: 0 or more")

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Layers are compressed together."""
        raise AssertionError

    def compress_layers(self, layers: Sequence[tuple[Sequence[Segment], Recent, Place]]) -> Sequence[Kept | None]:
        """The prompt's tokens of pairs of layers; tokens behind it stay as they are."""
        kept: list[Kept | None] = [None] * len(layers)
        count = min(recent.keys.shape[1] for _, recent, _ in layers) - self.recent
        if count < 1 or any(segments for segments, _, _ in layers):
            return kept
        first = round(self.start * len(layers))
        for lower in range(first, len(layers) - 1, 2):
            (_, below, _), (_, above, _) = layers[lower], layers[lower + 1]
            if below.keys.shape[0] != above.keys.shape[0] or below.keys.shape[2] != above.keys.shape[2]:
                continue
            parts = [
                interpolated(
                    _rows(getattr(above, name), count), _rows(getattr(below, name), count), self.share, self.spread
                )
                for name in ("keys", "values")
            ]
            for place, layer, recent in ((0, lower + 1, above), (1, lower, below)):
                positions = recent.positions[:count].clone().expand(len(recent.keys), -1)
                segment = Pair(parts[0][place], parts[1][place], positions)
                kept[layer] = Kept([segment], recent.keys.shape[1] - count)
        return kept


def _rows(vectors: Tensor, count: int) -> Tensor:
    """The first vectors of (H, T, D), all heads of a token in a row."""
    return torch.flatten(vectors[:, :count].transpose(0, 1), 1)
