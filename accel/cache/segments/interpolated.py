"""Segments of two layers that share directions: each has its own lengths, and some tokens of its own."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.pair import by_head


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

    def dense(self, heads: int) -> Tensor:
        """The vectors (H, T, D)."""
        whole = (self.direction.float() * self.length[:, None]).to(self.direction.dtype)
        whole[self.own.long()] = self.vectors
        return by_head(whole, heads)


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
