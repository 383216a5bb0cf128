"""Segments of two layers that share directions: each has its own lengths, and some tokens of its own."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import Segment


@dataclass(frozen=True)
class Interpolated:
    """Vectors (T, C) of a layer. direction: (T, C), shared with another layer. length: (T,).

    own: (E,) int32, tokens that the layers do not share, and vectors: (E, C).
    """

    direction: Tensor
    length: Tensor
    own: Tensor
    vectors: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (self.direction, self.length, self.own, self.vectors)

    def dense(self) -> Tensor:
        """The vectors."""
        whole = (self.direction.float() * self.length[:, None]).to(self.direction.dtype)
        whole[self.own.long()] = self.vectors
        return whole


@dataclass(frozen=True)
class SharedDirections(Segment):
    """keys, values: of all heads together. positions: (H, T) int32, of one row."""

    keys: Interpolated
    values: Interpolated
    positions: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.positions.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """Those of keys and values, and positions."""
        yield from self.keys.tensors()
        yield from self.values.tensors()
        yield self.positions

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (H, T, D)."""
        heads = len(self.positions)
        keys, values = (part.dense().unflatten(1, (heads, -1)).transpose(0, 1) for part in (self.keys, self.values))
        return keys, values, self.positions


def interpolated(upper: Tensor, lower: Tensor, share: float, spread: float) -> tuple[Interpolated, Interpolated]:
    """Both layers' vectors, from those of the upper and of the lower layer, (T, C) each.

    The direction is that at `share` of the arc from the upper to the lower one (slerp). Tokens whose angle is within
    `spread` times the range of angles of the largest one keep their own vectors.
    """
    lengths = [part.float().norm(dim=1) for part in (upper, lower)]
    units = [
        part.float() / length.clamp(min=1e-12)[:, None] for part, length in zip((upper, lower), lengths, strict=True)
    ]
    angle = (units[0] * units[1]).sum(1).clamp(-1, 1).acos()
    sine = angle.sin()
    # Equal directions have no arc, and opposite ones no unique arc.
    flat = sine < 1e-4
    weights = [
        torch.where(flat, 1 - part, ((1 - part) * angle).sin() / sine.masked_fill(flat, 1.0))
        for part in (share, 1 - share)
    ]
    direction = (units[0] * weights[0][:, None] + units[1] * weights[1][:, None]).to(upper.dtype)
    limit = angle.max() - spread * (angle.max() - angle.min())
    own = (angle > limit).nonzero()[:, 0]
    upper_part, lower_part = (
        Interpolated(direction, length, own.int(), part[own].clone())
        for part, length in zip((upper, lower), lengths, strict=True)
    )
    return upper_part, lower_part
