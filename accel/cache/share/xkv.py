"""xKV: layers next to each other share the low-rank basis of their prompt's keys and values.

Source: Chang et al. 2025, arXiv:2503.18893, and its code: keys without their rotation, the tokens of the prompt only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.low_rank import LowRank, factors
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class XKV(CacheMethod):
    """Low rank over layers. layers: that share a basis. key_rank, value_rank: as shares of a layer's features.

    recent: last tokens of the prompt that stay as they are.
    """

    layers: int = 4
    key_rank: float = 0.5
    value_rank: float = 0.75
    recent: int = 32

    has_budget: ClassVar[bool] = False
    joins_layers: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layers < 1 or self.recent < 0:
            raise UserError(f"need cache.layers >= 1 and cache.recent >= 0, got {self.layers} and {self.recent}")
        for name in ("key_rank", "value_rank"):
            if not 0 < getattr(self, name) <= self.layers:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: above 0, to cache.layers")

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Layers are compressed together."""
        raise AssertionError

    def compress_layers(self, layers: Sequence[tuple[Sequence[Segment], Recent, Place]]) -> Sequence[Kept | None]:
        """The prompt's tokens in low rank; tokens behind it stay as they are."""
        count = min(recent.keys.shape[1] for _, recent, _ in layers) - self.recent
        if layers[0][0] or count < 1:
            return [None] * len(layers)
        kept: list[Kept | None] = []
        for first in range(0, len(layers), self.layers):
            kept += self._group(layers[first : first + self.layers], count)
        return kept

    def _group(self, group: Sequence[tuple[Sequence[Segment], Recent, Place]], count: int) -> list[Kept]:
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for share, of in ((self.key_rank, _plain_keys), (self.value_rank, _values)):
            matrices = [of(recent, place, count) for _, recent, place in group]
            width = matrices[0].shape[1]
            left, right = factors(torch.cat(matrices, 1), max(1, round(share * width)))
            parts.append([(left, own.contiguous()) for own in right.split(width, 1)])
        kept = []
        for (_, recent, place), keys, values in zip(group, *parts, strict=True):
            positions = recent.positions[:count].clone().expand(len(recent.keys), -1)
            assert place.rotary is not None
            segment = LowRank(keys, values, positions, place.rotary)
            kept.append(Kept([segment], recent.keys.shape[1] - count))
        return kept


def _plain_keys(recent: Recent, place: Place, count: int) -> Tensor:
    """Keys (T, H * D) without their rotation."""
    assert place.rotary is not None
    positions = recent.positions[:count].expand(len(recent.keys), -1)
    return place.rotary(recent.keys[:, :count], positions, True).transpose(0, 1).flatten(1)


def _values(recent: Recent, place: Place, count: int) -> Tensor:
    return recent.values[:, :count].transpose(0, 1).flatten(1)
