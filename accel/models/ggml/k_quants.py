"""ggml's K-quants: blocks of 256 columns, whose groups have whole factors of one float16 scale and minimum."""

from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.models.ggml.base import (
    BlockGrid,
    BlockType,
    as_half,
    half_bytes,
    pack_bits,
    unpack_bits,
)


class _KQuant(BlockType):
    columns: ClassVar[int] = 256


class Q2K(_KQuant):
    """2.625 bits: scales and minima of 4 bits for 16 columns."""

    name, number, nbytes, bits, group, scale_range = "q2_k", 10, 84, 2, 16, (0, 15)

    @classmethod
    def _pack(cls, codes: Tensor, grid: BlockGrid) -> list[Tensor]:
        assert grid.scales is not None
        assert grid.minima is not None
        assert grid.minimum is not None
        factors = (grid.scales | grid.minima << 4).to(torch.uint8)
        return [factors, pack_bits(codes, 2, 32), half_bytes(grid.scale), half_bytes(grid.minimum)]

    @classmethod
    def _unpack(cls, blocks: Tensor) -> tuple[Tensor, BlockGrid]:
        factors, packed = blocks[:, :16].to(torch.int16), blocks[:, 16:80]
        scale, minimum = as_half(blocks[:, 80:82]), as_half(blocks[:, 82:84])
        return unpack_bits(packed, 2, 32), BlockGrid(scale, minimum, factors & 15, factors >> 4)


class Q3K(_KQuant):
    """3.4375 bits: signed scales of 6 bits for 16 columns, without minima."""

    name, number, nbytes, bits, group, middle, scale_range = "q3_k", 11, 110, 3, 16, 4, (-32, 31)

    @classmethod
    def _pack(cls, codes: Tensor, grid: BlockGrid) -> list[Tensor]:
        assert grid.scales is not None
        factors = (grid.scales + 32).to(torch.uint8)
        low, high = pack_bits(factors & 15, 4, 8), pack_bits(factors >> 4, 2, 4)
        return [pack_bits(codes >> 2, 1, 32), pack_bits(codes & 3, 2, 32), low, high, half_bytes(grid.scale)]

    @classmethod
    def _unpack(cls, blocks: Tensor) -> tuple[Tensor, BlockGrid]:
        codes = unpack_bits(blocks[:, 32:96], 2, 32) | unpack_bits(blocks[:, :32], 1, 32) << 2
        factors = unpack_bits(blocks[:, 96:104], 4, 8) | unpack_bits(blocks[:, 104:108], 2, 4) << 4
        return codes, BlockGrid(as_half(blocks[:, 108:110]), None, factors.to(torch.int16) - 32)


class _WithMinima(_KQuant):
    """Types whose scales and minima have 6 bits for 32 columns."""

    group: ClassVar[int] = 32
    scale_range: ClassVar[tuple[int, int] | None] = (0, 63)

    @classmethod
    def _pack(cls, codes: Tensor, grid: BlockGrid) -> list[Tensor]:
        assert grid.scales is not None
        assert grid.minima is not None
        assert grid.minimum is not None
        scales, minima = grid.scales.to(torch.uint8), grid.minima.to(torch.uint8)
        # Four bytes each for the scales of the first half of the groups, for their minima, and for the lower bits of
        # both in the second half, whose upper bits are in the highest bits of the first ones.
        halves = [factors[:, :4] | factors[:, 4:] >> 4 << 6 for factors in (scales, minima)]
        factors = [*halves, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4]
        high = [pack_bits(codes >> 4, 1, 32)] if cls.bits == 5 else []
        return [half_bytes(grid.scale), half_bytes(grid.minimum), *factors, *high, pack_bits(codes & 15, 4, 32)]

    @classmethod
    def _unpack(cls, blocks: Tensor) -> tuple[Tensor, BlockGrid]:
        first_scales, first_minima, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
        scales = torch.cat([first_scales & 63, both & 15 | first_scales >> 6 << 4], dim=1).to(torch.int16)
        minima = torch.cat([first_minima & 63, both >> 4 | first_minima >> 6 << 4], dim=1).to(torch.int16)
        if cls.bits == 5:
            codes = unpack_bits(blocks[:, 48:], 4, 32) | unpack_bits(blocks[:, 16:48], 1, 32) << 4
        else:
            codes = unpack_bits(blocks[:, 16:], 4, 32)
        return codes, BlockGrid(as_half(blocks[:, :2]), as_half(blocks[:, 2:4]), scales, minima)


class Q4K(_WithMinima):
    """4.5 bits."""

    name, number, nbytes, bits = "q4_k", 12, 144, 4


class Q5K(_WithMinima):
    """5.5 bits."""

    name, number, nbytes, bits = "q5_k", 13, 176, 5


class Q6K(_KQuant):
    """6.5625 bits: signed scales of 8 bits for 16 columns, without minima."""

    name, number, nbytes, bits, group, middle, scale_range = "q6_k", 14, 210, 6, 16, 32, (-128, 127)

    @classmethod
    def _pack(cls, codes: Tensor, grid: BlockGrid) -> list[Tensor]:
        assert grid.scales is not None
        factors = grid.scales.to(torch.int8).view(torch.uint8)
        return [pack_bits(codes & 15, 4, 64), pack_bits(codes >> 4, 2, 32), factors, half_bytes(grid.scale)]

    @classmethod
    def _unpack(cls, blocks: Tensor) -> tuple[Tensor, BlockGrid]:
        codes = unpack_bits(blocks[:, :128], 4, 64) | unpack_bits(blocks[:, 128:192], 2, 32) << 4
        factors = blocks[:, 192:208].contiguous().view(torch.int8).to(torch.int16)
        return codes, BlockGrid(as_half(blocks[:, 208:210]), None, factors)
