"""Base classes of weight quantizers and of their grids, and the quantized weight that quantizers return."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from hasten.accel.compression.method import Method, P
from hasten.accel.compression.quantizers.columns import STEPS
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError
from hasten.accel.models.ggml.base import BlockType, BlockWeight
from hasten.kernels.dequantize import dequantize
from hasten.kernels.grid_rounding import Points
from hasten.kernels.grid_rounding.reference import encode_, nearest, values_of

MIN_BITS, MAX_BITS = 2, 8
# Group size that is chosen for each layer by its columns.
AUTO = "auto"
# The smallest step that is tried, as a share of the best step for normal weights of the same root mean square. Outliers
# that raise the root mean square by more than two fifths cost more than all other weights if they are clipped.
_LEAST_STEP = 0.6


class WeightScheme(ABC):
    """Grid of a layer's weights: the values that codes stand for, and which weights share a scale. Frozen dataclasses.

    A weight is its code's value times the scale of its group, rounded to the dtype that value_dtype gives. Values are
    float32 and exact. Integers have a zero point in each group, which value 0 is the code of; other grids have none,
    and ignore the arguments `zero`.

    kind: `int` or `float`. strategy: what shares a scale, in compressed-tensors' words: tensor, channel (a row), group,
    block, or tensor_group (groups under one scale of the layers). scale_format: how scales are stored, in the words of
    InputScheme.scale.
    """

    @property
    @abstractmethod
    def kind(self) -> str:
        """`int` or `float`."""

    @property
    @abstractmethod
    def strategy(self) -> str:
        """What shares a scale."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def group_size(self) -> int | str:
        """Number of input columns that share a scale, -1 for a whole row, `auto` until the layer is known."""

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return True

    @property
    def block_rows(self) -> int:
        """Rows, counted from a layer's first one, that share their scales."""
        return 1

    @property
    def scale_format(self) -> str:
        """How scales are stored."""
        return "plain"

    def columns(self, total: int) -> int:
        """Number of columns that share a scale in a layer with `total` columns."""
        size = self.group_size
        assert isinstance(size, int), "the group size is not chosen yet"
        return total if size == -1 else size

    def fits(self, columns: int) -> bool:
        """Whether group_size divides the columns of a layer; `auto` fits all layers."""
        return self.group_size == AUTO or columns % self.columns(columns) == 0

    @property
    def is_shared(self) -> bool:
        """Whether layers that servers fuse must share a scale, which `of_layers` sets."""
        return False

    @property
    def layers_scale(self) -> float | None:
        """That scale; None where there is none, and until it is set."""
        return None

    def of_layers(self, peak: float) -> Self:
        """The grid with the scale that layers share. peak: their largest magnitude. Itself where there is none."""
        return self

    def bound(self, weight: Tensor) -> Self:
        """The grid for weight (R, C), which is all that shares its scale where of_layers was not called."""
        return self.of_layers(float(weight.abs().max())) if self.is_shared else self

    @abstractmethod
    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Exact size of a layer: codes, zero points, and scales, of itemsize bytes where they are stored plain."""

    # Codes

    @property
    @abstractmethod
    def points(self) -> Points:
        """The values that codes stand for, as kernels take them."""

    def nearest(self, values: Tensor, zero: Tensor) -> Tensor:
        """Nearest values of the grid to weights divided by their scale, which are overwritten."""
        return nearest(values, zero, self.points)

    def encode(self, values: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
        """The same, and their codes in `codes` uint8."""
        return encode_(values, zero, self.points, codes)

    def values(self, codes: Tensor, zero: Tensor) -> Tensor:
        """Values of codes, float32."""
        return values_of(codes, zero, self.points)

    @abstractmethod
    def reach(self, zero: Tensor) -> Tensor | float:
        """Largest magnitude of a value."""

    @abstractmethod
    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Weight (R, C), rounded as loaders round it. codes (R, C); scale (R, G), as stored; zero_point (R, G)."""

    def value_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the weight that loaders unpack, in a checkpoint of this dtype."""
        return dtype

    # Scales

    @abstractmethod
    def of_range(self, low: Tensor, high: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32, of a grid that spans factor times [low, high], of any shape.

        dtype: of the checkpoint; the scale is one that can be stored.
        """

    @property
    def searched(self) -> int:
        """Number of ranges that rounding to nearest searches where nothing else is asked for; 0: the full range."""
        return 0

    def factors(self, search: int, shrink: float) -> Sequence[float]:
        """Shares of the full range that a search tries, besides all of it; see quantizers.grid.find_grid."""
        return [shrink + (1 - shrink) * index / search for index in range(search)]

    def least_factor(self, groups: Tensor, peak: Tensor) -> Tensor | None:
        """Share of the range (R, G) below which a search need not go, by the groups' other weights; None: see factors.

        groups: (R, G, columns). peak: (R, G), their largest magnitude.
        """
        return None

    def stored_scale(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The nearest scales that can be stored, as they are stored, in a checkpoint of this dtype."""
        return scale.to(dtype)

    def scales(self, stored: Tensor) -> Tensor:
        """Scales, float32, from stored ones."""
        return stored.float()

    @abstractmethod
    def of_one_group(self) -> Self:
        """The same grid, with one scale for a row of the weights that are given."""


@dataclass(frozen=True)
class Scheme(WeightScheme):
    """Uniform grid of a layer, whose codes are integers.

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

    @property
    def kind(self) -> str:
        """Integers."""
        return "int"

    @property
    def strategy(self) -> str:
        """A row or a group has a scale."""
        return "channel" if self.group_size == -1 else "group"

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

    def of_one_group(self) -> "Scheme":
        """The scheme with a scale a row."""
        return replace(self, group_size=-1)

    @property
    def suffix(self) -> str:
        """What the name of a level says of the groups: `g128`, `gauto`, or nothing for one scale a row."""
        return "" if self.group_size == -1 else f"g{self.group_size}"

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Codes, scales of itemsize bytes, and zero points."""
        groups = rows * (columns // self.columns(columns))
        return rows * columns * self.bits + groups * (8 * itemsize + (0 if self.symmetric else self.bits))

    @property
    def top(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    @property
    def points(self) -> Points:
        """Whole numbers of so many bits."""
        return Points("int", self.bits)

    def reach(self, zero: Tensor) -> Tensor:
        """The distance of the zero point from the farther end of the codes."""
        return torch.maximum(zero, self.top - zero)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Weight (R, C) in the dtype of the scale."""
        return dequantize(codes, scale, zero_point)

    def of_range(self, low: Tensor, high: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """On symmetric grids factor and scale may be negative: code 0 is the value of largest magnitude."""
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            exact = torch.where(-low >= high, -low, -high) * (factor / middle)
            zero = torch.full_like(exact, middle)
        else:
            exact = (high - low) * (factor / self.top)
            zero = torch.zeros_like(exact)
        scale = exact.to(dtype).float()
        # A group of zeros has the range 0: no scale may become zero.
        scale = torch.copysign(scale.abs().clamp(min=smallest_scale(dtype)), scale)
        if not self.symmetric:
            zero = (-low * factor / scale).round().clamp(0, self.top)
        # In float16, a scale that is rounded up may take the value of the largest code beyond the range of numbers.
        info, reach = torch.finfo(dtype), self.reach(zero)
        largest = (info.max * (1 - info.eps) / reach).to(dtype).float()
        return torch.where(scale.abs() * reach <= info.max, scale, torch.copysign(largest, scale)), zero

    def factors(self, search: int, shrink: float) -> list[float]:
        """A symmetric grid has one step more on its negative side; a negative scale moves it to the positive one."""
        tried = [shrink + (1 - shrink) * index / search for index in range(search)]
        return [*tried, *(-factor for factor in [*tried, 1.0])] if self.symmetric and search else tried

    def least_factor(self, groups: Tensor, peak: Tensor) -> Tensor:
        """The range at which the step is too small for the groups' root mean square."""
        steps = STEPS[self.bits] * groups.square().mean(-1).sqrt() * _LEAST_STEP
        # A group of zeros needs no smaller range.
        return (steps * 2 ** (self.bits - 1) / peak).masked_fill_(steps == 0, torch.inf)


def smallest_scale(dtype: torch.dtype) -> float:
    """Smallest scale above zero: float16's subnormal numbers are common, and servers compute with them."""
    info = torch.finfo(dtype)
    return float(info.tiny * info.eps if dtype == torch.float16 else info.tiny)


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight (R, C) with their scales and zero points.

    codes: (R, C) uint8. scale: (R, G) as stored, see WeightScheme.stored_scale, but for every row, also where rows
    share it. zero_point: (R, G) uint8; it is not stored on symmetric grids, where on integers it is the middle code
    everywhere, and on floats 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: WeightScheme

    def dequantize(self) -> Tensor:
        """Weight (R, C), rounded as loaders round it."""
        return self.scheme.dequantize(self.codes, self.scale, self.zero_point)

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

    def cost(self, layers: LayerStack, scheme: WeightScheme) -> MethodCost | None:
        """Cost of prepare() and of the solve for layers of this shape; None where the method does not state it."""
        return None

    @abstractmethod
    def quantize(self, weight: Tensor, prepared: P, scheme: WeightScheme) -> Result[QuantizedWeight]:
        """Quantize weight (R, C), in the checkpoint's dtype; prepared comes from prepare()."""

    def quantize_blocks(self, weight: Tensor, prepared: P, kind: type[BlockType]) -> Result[BlockWeight]:
        """Quantize weight (R, C) to one of ggml's block types, which level kinds ask for; not every method can."""
        raise NotImplementedError

    def blocks_cost(self, layers: LayerStack, kind: type[BlockType]) -> MethodCost | None:
        """Cost of prepare() and of quantize_blocks; None where the method does not state it."""
        return None
