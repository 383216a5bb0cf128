"""Segments in FP8 (e4m3): one byte a number, one scale a head for keys and for values."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import Segment

_TOP = 448.0


@dataclass(frozen=True)
class Float8(Segment):
    """keys, values: (H, T, D) e4m3. key_scale, value_scale: (H, 1, 1) float32. positions: (H, T) int32."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor
    value_scale: Tensor
    positions: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor) -> "Float8":
        """The segment of keys and values (H, T, D)."""
        (key_codes, key_scales), (value_codes, value_scales) = _encode(keys), _encode(values)
        return cls(key_codes, value_codes, key_scales, value_scales, positions, keys.dtype)

    @property
    def tokens(self) -> int:
        """T."""
        return self.keys.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """Codes, scales and positions."""
        yield from (self.keys, self.values, self.key_scale, self.value_scale, self.positions)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded keys and values."""
        keys = (self.keys.float() * self.key_scale).to(self.dtype)
        return keys, (self.values.float() * self.value_scale).to(self.dtype), self.positions


def _encode(part: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of (H, T, D) and their scales (H, 1, 1)."""
    wide = part.float()
    scale = wide.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _TOP
    return (wide / scale).clamp(-_TOP, _TOP).to(torch.float8_e4m3fn), scale
