"""Base class of weight quantizers, the scheme that they quantize by, and the quantized weight that they return."""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.accel.compression.formats.ggml.base import BlockType, BlockWeight
from hasten.accel.compression.method import Method, P
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError
from hasten.kernels.dequantize import dequantize

MIN_BITS, MAX_BITS = 2, 8
# Group size that is chosen for each layer by its columns.
AUTO = "auto"


@dataclass(frozen=True)
class Scheme:
    """Uniform grid of a layer.

    bits: of a code. group_size: number of input columns that share a scale, -1 for a whole row, `auto` until the layer
    is known (see calibration/group_sizes.py). symmetric: without zero points.
    """

    bits: int = 4
    group_size: int | str = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UserError(f"bits={self.bits} is out of range: {MIN_BITS} to {MAX_BITS}")
        if isinstance(self.group_size, str):
            if self.group_size != AUTO:
                raise UserError(f"group_size={self.group_size} is wrong: expected a number or {AUTO}")
        elif self.group_size != -1 and self.group_size < 8:
            raise UserError(f"group_size={self.group_size} is out of range: 8 or more, or -1 for one scale a row")

    def columns(self, total: int) -> int:
        """Number of columns that share a scale in a layer with `total` columns."""
        assert isinstance(self.group_size, int), "the group size is not chosen yet"
        return total if self.group_size == -1 else self.group_size

    def fits(self, columns: int) -> bool:
        """Whether group_size divides the columns of a layer; `auto` fits all layers."""
        return self.group_size == AUTO or columns % self.columns(columns) == 0

    def check(self, layer: str, columns: int) -> None:
        """UserError where group_size does not divide the layer's columns."""
        if not self.fits(columns):
            raise UserError(
                f"group_size={self.group_size} does not divide the {columns} columns of {layer}: "
                f"use a divisor, group_size={AUTO}, group_size=-1 (one scale a row), or ignore the layer"
            )

    def of_group_size(self, size: int) -> "Scheme":
        """The scheme with this group size in place of `auto`."""
        return replace(self, group_size=size) if self.group_size == AUTO else self

    @property
    def suffix(self) -> str:
        """What the name of a level says of the groups: `g128`, `gauto`, or nothing for one scale a row."""
        return "" if self.group_size == -1 else f"g{self.group_size}"

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Exact size of a layer: codes, scales of itemsize bytes, and zero points."""
        groups = rows * (columns // self.columns(columns))
        return rows * columns * self.bits + groups * (8 * itemsize + (0 if self.symmetric else self.bits))

    @property
    def top(self) -> int:
        """Largest code."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight (R, C) with their scales and zero points.

    codes: (R, C) uint8 in [0, 2**bits - 1]. scale: (R, G) in the stored dtype. zero_point: (R, G) uint8; on symmetric
    grids it is the middle code everywhere, and not stored.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """Weight (R, C) in the dtype of the scale, rounded as the servers round it."""
        return dequantize(self.codes, self.scale, self.zero_point)

    @property
    def bits(self) -> int:
        """Exact size: codes, scales and stored zero points."""
        rows, columns = self.codes.shape
        return self.scheme.stored_bits(rows, columns, self.scale.element_size())

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Rows start to stop, such as those of one of several layers that were quantized together."""
        return QuantizedWeight(self.codes[start:stop], self.scale[start:stop], self.zero_point[start:stop], self.scheme)

    @classmethod
    def join(cls, parts: list["QuantizedWeight"]) -> "QuantizedWeight":
        """One weight from its consecutive pieces."""
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.zero_point for part in parts]),
            parts[0].scheme,
        )


class Quantizer(Method[P]):
    """A way to choose the codes of one linear layer; layers that share an input may be stacked by rows."""

    def cost(self, layers: LayerStack, scheme: Scheme) -> MethodCost | None:
        """Cost of prepare() and of the solve for layers of this shape; None where the method does not state it."""
        return None

    @abstractmethod
    def quantize(self, weight: Tensor, prepared: P, scheme: Scheme) -> Result[QuantizedWeight]:
        """Quantize weight (R, C), whose dtype is also that of the scales; prepared comes from prepare()."""

    def quantize_blocks(self, weight: Tensor, prepared: P, kind: type[BlockType]) -> Result[BlockWeight]:
        """Quantize weight (R, C) to one of ggml's block types, which level kinds ask for; not every method can."""
        raise NotImplementedError

    def blocks_cost(self, layers: LayerStack, kind: type[BlockType]) -> MethodCost | None:
        """Cost of prepare() and of quantize_blocks; None where the method does not state it."""
        return None
