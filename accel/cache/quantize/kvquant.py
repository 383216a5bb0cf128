"""KVQuant: codes for the centroids of normalised numbers, keys by channel before their rotation, outliers kept apart.

Source: Hooper et al. 2024, arXiv:2401.18079, and its code. Departs from it: ranges of the keys' channels and centroids
are those of the prompt, and not of other text before, and centroids are not weighted by gradients; Q-Norm is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.nonuniform import Codes, NonUniform, centroids_of
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS


@dataclass(frozen=True)
class KVQuant(CacheMethod):
    """Quantizer to centroids.

    bits: of a number. outliers: share of the numbers of a channel of keys, and of a token's values, that are kept as
    they are. sinks: first tokens that stay as they are. residual: last ones. block: tokens packed at a time.
    """

    bits: int = 3
    outliers: float = 0.01
    sinks: int = 1
    residual: int = 32
    block: int = 32

    has_budget: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"cache.bits={self.bits} is none of {', '.join(map(str, BITS))}")
        if not 0 <= self.outliers < 0.5:
            raise UserError(f"cache.outliers={self.outliers} is out of range: 0 to less than 0.5")
        if min(self.sinks, self.residual) < 0 or self.block < 1:
            raise UserError(
                "need cache.sinks >= 0, cache.residual >= 0 and cache.block >= 1, got "
                f"{self.sinks}, {self.residual} and {self.block}"
            )

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Whole blocks of the oldest dense tokens are packed behind the sinks; no token is packed twice."""
        heads, count = recent.keys.shape[:2]
        sinks = 0 if segments else min(self.sinks, count)
        packed = (count - self.residual - sinks) // self.block * self.block
        if packed < self.block:
            return None
        assert place.rotary is not None
        made, own = list(segments), slice(sinks, sinks + packed)
        positions = recent.positions.expand(heads, -1)
        if sinks:
            first = (part[:, :sinks].clone() for part in (recent.keys, recent.values, positions))
            made.append(Dense(*first))
        keys = place.rotary(recent.keys[:, own], positions[:, own], True).transpose(0, 1).flatten(1)
        values = recent.values[:, own].transpose(0, 1).flatten(1)
        before = next((segment for segment in segments if isinstance(segment, NonUniform)), None)
        made.append(
            NonUniform(
                self._keys(keys, None if before is None else before.keys),
                self._values(values, None if before is None else before.values),
                recent.positions[own].clone().expand(heads, -1),
                place.rotary,
            )
        )
        return Kept(made, count - sinks - packed)

    def _keys(self, keys: Tensor, before: Codes | None) -> Codes:
        """Keys (T, C) by the ranges of the prompt's channels; what is outside them is an outlier."""
        if before is None:
            low, high = self._ends(keys, 0)
            scale, middle = _range(low, high, keys.dtype)
            inside = (keys >= low) & (keys <= high)
            centroids = centroids_of(((keys.float() - middle.float()) / scale.float())[inside], self.bits)
        else:
            scale, middle, centroids = before.scale, before.middle, before.centroids
        outside = (keys.float() - middle.float()).abs() > scale.float() * (1 + 1e-3)
        return Codes.of(keys, centroids, scale, middle, outside, self.bits)

    def _values(self, values: Tensor, before: Codes | None) -> Codes:
        """Values (T, C) by the ranges of their tokens."""
        low, high = self._ends(values, 1)
        scale, middle = _range(low, high, values.dtype)
        outside = (values < low) | (values > high)
        if before is None:
            normal = (values.float() - middle.float()) / scale.float()
            centroids = centroids_of(normal[~outside], self.bits)
        else:
            centroids = before.centroids
        return Codes.of(values, centroids, scale, middle, outside, self.bits)

    def _ends(self, vectors: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Least and largest numbers along dim that are no outliers."""
        size = vectors.shape[dim]
        ordered = vectors.float().sort(dim=dim).values
        cut = min(round(self.outliers / 2 * size), (size - 1) // 2)
        return ordered.narrow(dim, cut, 1), ordered.narrow(dim, size - 1 - cut, 1)


def _range(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Half of the range and its middle, by which numbers are brought to -1 … 1."""
    scale = ((high - low) / 2).clamp(min=torch.finfo(torch.float16).tiny)
    return scale.to(dtype), ((high + low) / 2).to(dtype)
