"""Base class of ggml's block types: groups of columns with a scale and perhaps a minimum, in blocks of bytes.

Source: github.com/ggml-org/ggml, whose Python package `gguf` dequantizes the same bytes to the same float32 values.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockGrid:
    """Scales of all groups of a matrix (R, C), with R rows, S blocks a row and G groups a row.

    scale: (R, S) float16. minimum: (R, S) float16, None where the type has none. scales, minima: (R, G) int16, the
    factors of these in each group; None where a block is one group.
    """

    scale: Tensor
    minimum: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None

    def steps(self) -> Tensor:
        """Difference between the values of two neighbouring codes, (R, G) float32; zero or negative in some groups."""
        return _product(self.scale, self.scales)

    def where(self, rows: Tensor, other: "BlockGrid") -> "BlockGrid":
        """The other grid in the rows that are true in rows (R,), and this one in all others."""
        return combined([self, other], lambda pair: torch.where(rows[:, None], pair[1], pair[0]))

    def offsets(self) -> Tensor | None:
        """What is subtracted from the product of code and step, (R, G) float32; None where the type has no minimum."""
        return None if self.minimum is None else _product(self.minimum, self.minima)


def _product(scale: Tensor, factors: Tensor | None) -> Tensor:
    if factors is None:
        return scale.float()
    rows, blocks = scale.shape
    return (scale.float()[..., None] * factors.float().view(rows, blocks, -1)).flatten(1)


class BlockType(ABC):
    """One of ggml's types.

    name: as in GGUF, lower case. number: its number in a GGUF file. columns: of a block. group: columns that share a
    scale. nbytes: of a block. bits: of a code. middle: code of the value zero; None where groups have a minimum.
    scale_range: least and largest factor of a group; None where a block is one group. Minima have the same range.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    columns: ClassVar[int]
    group: ClassVar[int]
    nbytes: ClassVar[int]
    bits: ClassVar[int]
    middle: ClassVar[int | None] = None
    scale_range: ClassVar[tuple[int, int] | None] = None

    @classmethod
    def top(cls) -> int:
        """Largest code."""
        return 2**cls.bits - 1

    @classmethod
    def row_bytes(cls, columns: int) -> int:
        """Bytes of a row."""
        return columns // cls.columns * cls.nbytes

    @classmethod
    def encode(cls, codes: Tensor, grid: BlockGrid) -> Tensor:
        """Blocks (R, bytes of a row) uint8 from codes (R, C) uint8 and their scales."""
        rows, columns = codes.shape
        blocks = columns // cls.columns
        flat = combined([grid], lambda part: part[0].reshape(rows * blocks, -1))
        return torch.cat(cls._pack(codes.reshape(rows * blocks, -1), flat), dim=1).view(rows, -1)

    @classmethod
    def decode(cls, stored: Tensor) -> tuple[Tensor, BlockGrid]:
        """Codes (R, C) uint8 and scales from blocks (R, bytes of a row)."""
        rows = len(stored)
        codes, grid = cls._unpack(stored.reshape(-1, cls.nbytes))
        return codes.view(rows, -1), combined([grid], lambda part: part[0].view(rows, -1))

    @classmethod
    def dequantize(cls, stored: Tensor) -> Tensor:
        """Weight (R, C) float32 from blocks (R, bytes of a row), to the last bit as ggml computes it."""
        codes, grid = cls.decode(stored)
        steps, offsets = grid.steps()[..., None], grid.offsets()
        values = codes.float().unflatten(1, (-1, cls.group))
        if cls.middle is not None:
            return values.sub_(cls.middle).mul_(steps).flatten(1)
        assert offsets is not None
        return values.mul_(steps).sub_(offsets[..., None]).flatten(1)

    @classmethod
    @abstractmethod
    def _pack(cls, codes: Tensor, grid: BlockGrid) -> list[Tensor]:
        """Parts, side by side, of blocks (N, bytes) uint8 from codes (N, columns of a block)."""

    @classmethod
    @abstractmethod
    def _unpack(cls, blocks: Tensor) -> tuple[Tensor, BlockGrid]:
        """Codes (N, columns of a block) and scales of blocks (N, nbytes)."""


def combined(grids: Sequence[BlockGrid], combine: Callable[[list[Tensor]], Tensor]) -> BlockGrid:
    """The grid whose parts `combine` makes of those of some grids."""

    def of(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return combine(present) if present else None

    return BlockGrid(
        combine([grid.scale for grid in grids]),
        of([grid.minimum for grid in grids]),
        of([grid.scales for grid in grids]),
        of([grid.minima for grid in grids]),
    )


def pack_bits(codes: Tensor, bits: int, width: int) -> Tensor:
    """Codes (N, C) of 1, 2 or 4 bits as bytes (N, C * bits / 8).

    A byte holds codes that are `width` columns apart, the first one in the lowest bits.
    """
    parts = codes.view(len(codes), -1, 8 // bits, width)
    packed = parts[:, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[:, :, place] << bits * place
    return packed.flatten(1)


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of pack_bits."""
    parts = packed.reshape(len(packed), -1, 1, width)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    return ((parts >> shifts) & (2**bits - 1)).flatten(1)


def half_bytes(values: Tensor) -> Tensor:
    """Bytes (N, 2) of float16 values (N, 1)."""
    return values.half().contiguous().view(torch.uint8)


def as_half(stored: Tensor) -> Tensor:
    """Float16 values (N, 1) of bytes (N, 2)."""
    return stored.contiguous().view(torch.float16)


@dataclass(frozen=True)
class BlockWeight:
    """A weight (R, C) in a block type.

    blocks: (R, bytes of a row) uint8, as a GGUF file holds them. dtype: of the weight that was quantized.
    """

    kind: type[BlockType]
    blocks: Tensor
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Exact size."""
        return 8 * self.blocks.numel()

    def dequantize(self) -> Tensor:
        """Weight (R, C) float32."""
        return self.kind.dequantize(self.blocks)

    def rows(self, start: int, stop: int) -> "BlockWeight":
        """Rows start to stop."""
        return BlockWeight(self.kind, self.blocks[start:stop], self.dtype)

    @classmethod
    def join(cls, parts: list["BlockWeight"]) -> "BlockWeight":
        """One weight from its consecutive pieces."""
        return cls(parts[0].kind, torch.cat([part.blocks for part in parts]), parts[0].dtype)
