"""Low-rank segments: keys without their rotation, and values, as products of a matrix of tokens and one of features."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.base import Rotation
from hasten.accel.cache.segments.base import Segment


@dataclass(frozen=True)
class LowRank(Segment):
    """keys, values: pairs of (T, R) and (R, H * D); layers may share the first. positions: (H, T) int32, of one row.

    rotary: see Place.
    """

    keys: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    positions: Tensor
    rotary: Rotation

    @property
    def tokens(self) -> int:
        """T."""
        return self.positions.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """The factors and positions."""
        yield from (*self.keys, *self.values, self.positions)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """The products; keys are rotated for their positions."""
        heads = len(self.positions)
        keys, values = (
            (left.float() @ right.float()).unflatten(1, (heads, -1)).transpose(0, 1).to(left.dtype)
            for left, right in (self.keys, self.values)
        )
        return self.rotary(keys, self.positions, False), values, self.positions


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors (T, R) and (R, C) of matrix (T, C) by singular values, in its dtype."""
    left, singular, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    count = min(rank, len(singular))
    return (left[:, :count] * singular[:count]).to(matrix.dtype).contiguous(), right[:count].to(
        matrix.dtype
    ).contiguous()
