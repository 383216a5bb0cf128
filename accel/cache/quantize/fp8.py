"""FP8: keys and values as e4m3 numbers, with a scale for each head of each block of tokens.

Source: Micikevicius et al. 2022, arXiv:2209.05433. What servers call an FP8 cache has one scale for a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.quantize.base import CacheQuantizer
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.float8 import Float8


@dataclass(frozen=True)
class FP8(CacheQuantizer):
    """Quantizer to e4m3."""

    def pack(self, segments: Sequence[Segment], keys: Tensor, values: Tensor, positions: Tensor) -> list[Segment]:
        """A segment more; its scales are those of its own tokens."""
        return [*segments, Float8.of(keys, values, positions)]
