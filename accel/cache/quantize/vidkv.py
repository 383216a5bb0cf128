"""VidKV: keys in 1.5 bits, most of them signs of their spectrum, and values in trits.

Source: Tao et al. 2025, arXiv:2503.16257, and its code, in its form for text: without salient visual tokens. Departs
from it: the spectrum of real numbers is stored without its mirrored half, so that a sign is a bit a number, where the
code stores two; the channels in two bits are those of the prompt's first packed tokens, and not chosen again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.quantize.base import CacheQuantizer
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.pair import Pair
from hasten.accel.cache.segments.trits import SignedSpectrum, Trits, wide_channels
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class VidKV(CacheQuantizer):
    """Quantizer by channel, in groups of `block` tokens.

    bits: mean of a key's numbers, without scales: a share bits - 1 of the channels has two bits, the others one. A
    value's numbers have 1.6. Scales add 16 bits a group of a channel, and the channels in two bits as many for offsets.
    """

    residual: int = 128
    bits: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.bits < 2:
            raise UserError(f"cache.bits={self.bits} is out of range: above 1 and below 2")

    def pack(self, segments: Sequence[Segment], keys: Tensor, values: Tensor, positions: Tensor) -> list[Segment]:
        """A segment more."""
        size = keys.shape[2]
        if segments:
            assert isinstance(segments[0], Pair)
            wide = segments[0].keys.wide
        else:
            wide = wide_channels(keys, min(max(1, round((self.bits - 1) * size)), size - 1))
        packed = SignedSpectrum.of(keys, wide, self.block), Trits.of(values, self.block)
        return [*segments, Pair(*packed, positions[:1].clone().expand(len(keys), -1))]
