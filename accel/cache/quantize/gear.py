"""GEAR: quantized keys and values, with outliers kept apart and a low-rank matrix for the rest of the error.

Source: Kang et al. 2024, arXiv:2403.05527, and its code for the defaults.
Departs from it: the same rank for all blocks, since a block has as many tokens in the prompt as behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.quantize.base import CacheQuantizer
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.corrected import Corrected, Correction, low_rank
from hasten.accel.cache.segments.packed import PackedSegment
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS

# Of the random matrices that the power iteration starts from.
_SEED = 0


@dataclass(frozen=True)
class GEAR(CacheQuantizer):
    """Quantizer with a correction of its error.

    bits: of a number. outliers: share of the numbers that are kept as they are: half of them the largest, half the
    smallest of a channel of keys and of a token's values, one of each at least. rank: of the low-rank matrix; 0 is
    none. loops: of its power iteration.
    """

    residual: int = 64
    block: int = 64
    bits: int = 2
    outliers: float = 0.02
    rank: int = 4
    loops: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise UserError(f"cache.bits={self.bits} is none of {', '.join(map(str, BITS))}")
        if not 0 <= self.outliers < 1:
            raise UserError(f"cache.outliers={self.outliers} is out of range: 0 to less than 1")
        if self.rank < 0 or self.loops < 1:
            raise UserError(f"need cache.rank >= 0 and cache.loops >= 1, got {self.rank} and {self.loops}")

    def pack(self, segments: Sequence[Segment], keys: Tensor, values: Tensor, positions: Tensor) -> list[Segment]:
        """A segment for every block."""
        made = list(segments)
        blocks = zip(*(part.split(self.block, 1) for part in (keys, values, positions)), strict=True)
        return [*made, *(self._block(*block) for block in blocks)]

    def _block(self, keys: Tensor, values: Tensor, positions: Tensor) -> Corrected:
        # Outliers are replaced by the mean of their vector, so that they do not widen its grid.
        plain_keys, key_places = _without_outliers(keys, 1, self.outliers)
        plain_values, value_places = _without_outliers(values, 2, self.outliers)
        packed = PackedSegment.of(plain_keys, plain_values, positions, self.bits, self.block)
        rounded_keys, rounded_values, _ = packed.dense()
        generator = torch.Generator().manual_seed(_SEED)
        corrections = [
            self._correction(exact, plain, rounded, places, generator)
            for exact, plain, rounded, places in (
                (keys, plain_keys, rounded_keys, key_places),
                (values, plain_values, rounded_values, value_places),
            )
        ]
        return Corrected(packed, *corrections)

    def _correction(
        self, exact: Tensor, plain: Tensor, rounded: Tensor, places: Tensor, generator: torch.Generator
    ) -> Correction:
        left, right = low_rank(plain.float() - rounded.float(), self.rank, self.loops, generator)
        left, right = left.to(exact.dtype), right.to(exact.dtype)
        near = rounded.float() + left.float() @ right.float()
        missing = (exact.float() - near).flatten()[places]
        return Correction(places.int(), missing.to(exact.dtype), left, right)


def _without_outliers(vectors: Tensor, dim: int, share: float) -> tuple[Tensor, Tensor]:
    """Vectors (H, T, D) with the outliers along dim replaced by the mean, and their places in the flattened vectors."""
    count = max(1, round(share / 2 * vectors.shape[dim]))
    if not share or 2 * count >= vectors.shape[dim]:
        return vectors, torch.empty(0, dtype=torch.long, device=vectors.device)
    order = vectors.float().sort(dim=dim, stable=True).indices
    ends = torch.cat([order.narrow(dim, 0, count), order.narrow(dim, vectors.shape[dim] - count, count)], dim)
    mask = torch.zeros(vectors.shape, dtype=torch.bool, device=vectors.device).scatter_(dim, ends, True)
    mean = vectors.float().mean(dim, keepdim=True).to(vectors.dtype)
    return torch.where(mask, mean, vectors), mask.flatten().nonzero()[:, 0]
