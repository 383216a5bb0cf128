"""Packed segments with a correction: outliers as they are, and a low-rank matrix for what rounding loses.

Source: Kang et al. 2024, arXiv:2403.05527 (GEAR).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.packed import PackedSegment


@dataclass(frozen=True)
class Correction:
    """What is added to dequantized vectors (H, T, D).

    places: int32, indices of outliers into the flattened vectors, and values: what is added there; both empty where
    there are none. left: (H, T, R), right: (H, R, D), whose product is added.
    """

    places: Tensor
    values: Tensor
    left: Tensor
    right: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (self.places, self.values, self.left, self.right)

    def applied(self, vectors: Tensor) -> Tensor:
        """The corrected vectors."""
        wide = (vectors.float() + self.left.float() @ self.right.float()).contiguous()
        wide.view(-1)[self.places.long()] += self.values.float()
        return wide.to(vectors.dtype)


@dataclass(frozen=True)
class Corrected(Segment):
    """packed: codes. keys, values: their corrections."""

    packed: PackedSegment
    keys: Correction
    values: Correction

    @property
    def tokens(self) -> int:
        """T."""
        return self.packed.tokens

    def tensors(self) -> Iterator[Tensor]:
        """Codes and corrections."""
        yield from self.packed.tensors()
        yield from self.keys.tensors()
        yield from self.values.tensors()

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Corrected keys and values."""
        keys, values, positions = self.packed.dense()
        return self.keys.applied(keys), self.values.applied(values), positions


def low_rank(residual: Tensor, rank: int, loops: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors (H, T, R) and (H, R, D) of residual (H, T, D), by power iteration from a random matrix."""
    heads, _, size = residual.shape
    rank = min(rank, size, residual.shape[1])
    right = torch.randn(heads, size, rank, generator=generator).to(residual.device)
    left = residual @ right
    for loop in range(loops):
        left = residual @ right
        if loop == loops - 1:
            left = torch.linalg.qr(left).Q
        right = residual.mT @ left
        if loop < loops - 1:
            right = torch.linalg.qr(right).Q
    return left, right.mT
