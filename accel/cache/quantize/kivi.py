"""KIVI: keys quantized by channel and values by token, the last tokens left as they are.

Source: Liu et al. 2024, arXiv:2402.02750.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.quantize.base import CacheQuantizer
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.packed import PackedSegment
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS


@dataclass(frozen=True)
class KIVI(CacheQuantizer):
    """Quantizer of keys in groups of `block` tokens and of values in groups of channels. bits: of a number."""

    bits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise UserError(f"cache.bits={self.bits} is none of {', '.join(map(str, BITS))}")

    def pack(self, segments: Sequence[Segment], keys: Tensor, values: Tensor, positions: Tensor) -> list[Segment]:
        """One segment of all packed tokens."""
        new = PackedSegment.of(keys, values, positions, self.bits, self.block)
        if not segments:
            return [new]
        (before,) = segments
        assert isinstance(before, PackedSegment)
        return [before.extended(new)]
