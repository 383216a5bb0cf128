"""ggml's types with a float16 scale for 32 columns: q4_0, q5_0 and q8_0; q4_1 and q5_1 also have a float16 minimum."""

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


class _OneScale(BlockType):
    columns: ClassVar[int] = 32
    group: ClassVar[int] = 32

    @classmethod
    def _pack(cls, codes: Tensor, grid: BlockGrid) -> list[Tensor]:
        parts = [half_bytes(grid.scale)]
        if grid.minimum is not None:
            # The file holds the value of code 0.
            parts.append(half_bytes(-grid.minimum))
        if cls.bits == 5:
            parts.append(pack_bits(codes >> 4, 1, 1))
        return [*parts, pack_bits(codes & 15, 4, 16)]

    @classmethod
    def _unpack(cls, blocks: Tensor) -> tuple[Tensor, BlockGrid]:
        at, minimum = 2, None
        if cls.middle is None:
            minimum, at = -as_half(blocks[:, 2:4]), 4
        if cls.bits == 5:
            codes = unpack_bits(blocks[:, at + 4 :], 4, 16) | unpack_bits(blocks[:, at : at + 4], 1, 1) << 4
        else:
            codes = unpack_bits(blocks[:, at:], 4, 16)
        return codes, BlockGrid(as_half(blocks[:, :2]), minimum)


class Q4Zero(_OneScale):
    """4.5 bits."""

    name, number, nbytes, bits, middle = "q4_0", 2, 18, 4, 8


class Q4One(_OneScale):
    """5 bits."""

    name, number, nbytes, bits = "q4_1", 3, 20, 4


class Q5Zero(_OneScale):
    """5.5 bits."""

    name, number, nbytes, bits, middle = "q5_0", 6, 22, 5, 16


class Q5One(_OneScale):
    """6 bits."""

    name, number, nbytes, bits = "q5_1", 7, 24, 5


class Q8Zero(_OneScale):
    """8.5 bits."""

    name, number, nbytes, bits, middle = "q8_0", 8, 34, 8, 128

    @classmethod
    def _pack(cls, codes: Tensor, grid: BlockGrid) -> list[Tensor]:
        # The file holds signed bytes: their highest bit is the other one.
        return [half_bytes(grid.scale), codes ^ 128]

    @classmethod
    def _unpack(cls, blocks: Tensor) -> tuple[Tensor, BlockGrid]:
        return blocks[:, 2:] ^ torch.tensor(128, dtype=torch.uint8), BlockGrid(as_half(blocks[:, :2]))
