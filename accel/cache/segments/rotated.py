"""Segments that are quantized in a rotated basis: a Hadamard matrix spreads outliers over all channels.

Source: Su et al. 2025, arXiv:2501.16383 (RotateKV).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from hasten.accel.cache.segments.pair import by_head
from hasten.kernels.quantize_pack import Packed, quantize_pack, unpack_dequantize
from hasten.kernels.walsh_hadamard import walsh_hadamard


@dataclass(frozen=True)
class RotatedVectors:
    """Vectors of T tokens and H heads: codes of (T * H / joined, joined * D) in the rotated basis.

    order: (H * D,) int32, the channels as they were sorted; None where they were not. joined: heads in one rotation.
    """

    codes: Packed
    order: Tensor | None
    joined: int

    @classmethod
    def of(
        cls, vectors: Tensor, bits: int, group: int, clip: float, joined: int, order: Tensor | None
    ) -> "RotatedVectors":
        """Of vectors (H, T, D). group: numbers that share a grid. clip: share of their range that the grid covers."""
        heads = len(vectors)
        rows = vectors.transpose(0, 1).flatten(1).float()  # (T, H * D)
        rows = rows if order is None else rows[:, order.long()]
        turned, _ = walsh_hadamard(rows.unflatten(1, (heads // joined, -1)).flatten(0, 1).contiguous())
        size = gcd(group, turned.shape[1])
        size = size if size % 32 == 0 else turned.shape[1]
        parts = turned.unflatten(1, (-1, size))
        low, high = clip * parts.amin(-1, keepdim=True), clip * parts.amax(-1, keepdim=True)
        clipped = torch.minimum(torch.maximum(parts, low), high).flatten(1).to(vectors.dtype)
        return cls(quantize_pack(clipped, bits, "token", size), order, joined)

    def tensors(self) -> Iterator[Tensor]:
        """Codes, scales, offsets and the order."""
        yield from (self.codes.words, self.codes.scale)
        yield from (part for part in (self.codes.offset, self.order) if part is not None)

    def dense(self, heads: int) -> Tensor:
        """Vectors (H, T, D)."""
        rounded = unpack_dequantize(self.codes)
        rows = _unrotated(rounded.float()).unflatten(0, (-1, heads // self.joined)).flatten(1)
        if self.order is not None:
            rows = torch.empty_like(rows).index_copy_(1, self.order.long(), rows)
        return by_head(rows, heads).to(rounded.dtype)


def _unrotated(rows: Tensor) -> Tensor:
    """The inverse of walsh_hadamard, whose matrix is orthogonal: its transpose, by the transform of unit rows."""
    size = rows.shape[1]
    matrix, _ = walsh_hadamard(torch.eye(size, device=rows.device))
    return rows @ matrix.T
