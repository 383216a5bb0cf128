"""Sparse segments: of every key and value vector the elements of largest magnitude, and a bitmap of where they are.

Source: Joo et al. 2025, arXiv:2505.22913 (Mustafar), whose format is a bitmap and the values that are not zero. Vectors
have equal numbers of elements here, so no offsets are stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseVectors:
    """Vectors (H, T, D) of K elements. values: (H, T, K). bitmap: (H, T, ceil(D / 8)) uint8, from the lowest bit on."""

    values: Tensor
    bitmap: Tensor
    size: int

    @classmethod
    def of(cls, vectors: Tensor, kept: int) -> "SparseVectors":
        """The `kept` largest elements of vectors (H, T, D); of equal ones the first."""
        size = vectors.shape[-1]
        order = vectors.abs().float().sort(dim=-1, descending=True, stable=True).indices[..., :kept].sort(-1).values
        mask = torch.zeros(vectors.shape, dtype=torch.bool, device=vectors.device).scatter_(-1, order, True)
        padded = torch.nn.functional.pad(mask, (0, -size % 8)).unflatten(-1, (-1, 8))
        weights = 2 ** torch.arange(8, device=vectors.device)
        return cls(vectors.gather(-1, order), (padded * weights).sum(-1).to(torch.uint8), size)

    def tensors(self) -> Iterator[Tensor]:
        """Values and bitmap."""
        yield from (self.values, self.bitmap)

    def dense(self, heads: int) -> Tensor:
        """Vectors (H, T, D) with zeros."""
        bits = (self.bitmap[..., None] >> torch.arange(8, device=self.bitmap.device)) & 1
        mask = bits.flatten(-2)[..., : self.size].bool()
        vectors = self.values.new_zeros(mask.shape)
        vectors[mask] = self.values.flatten()
        return vectors
