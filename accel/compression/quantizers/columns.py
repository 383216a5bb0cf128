"""Base class of quantizers that spread a layer's bits over its columns, and the weight that they return."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.method import Method, P
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError

MIN_WIDTH, MAX_WIDTH = 1, 8
# Stored bits of a column's width, which is 1 to 8.
_MAP_BITS = 4
# Steps, by bits, of the uniform quantizers of least error on normal numbers of variance 1 (Max 1960). They are part of
# the stored form: a row has one scale, and the step of a column is this constant times the scale.
STEPS = (0.0, 1.595769, 0.995687, 0.586019, 0.335201, 0.188139, 0.104063, 0.056868, 0.030762)


@dataclass(frozen=True)
class ColumnBits:
    """Bits by column: a whole number, its width, for each column of a layer, with this mean over the columns."""

    mean: float = 3.0

    def __post_init__(self) -> None:
        if not MIN_WIDTH <= self.mean <= MAX_WIDTH:
            raise UserError(f"column_bits={self.mean} is out of range: {MIN_WIDTH} to {MAX_WIDTH}")

    def total(self, columns: int) -> int:
        """Bits of a row's codes."""
        return round(self.mean * columns)

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Exact size of a layer: codes, 4 bits a column for their widths, and a scale of itemsize bytes a row."""
        return rows * self.total(columns) + columns * _MAP_BITS + rows * 8 * itemsize


def steps(widths: Tensor) -> Tensor:
    """Step between neighbouring values in columns of these widths (C,) for a scale of 1, (C,) float32."""
    return torch.tensor(STEPS, device=widths.device)[widths.long()]


@dataclass(frozen=True)
class ColumnWeight:
    """Codes of a weight (R, C) whose width differs by column, with widths and scales.

    codes: (R, C) uint8, below 2**width of their column. widths: (C,) uint8, bits. scale: (R,) in the stored dtype. The
    values are symmetric around zero, and zero is not one of them, unless the scale is zero.
    """

    codes: Tensor
    widths: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Weight (R, C) in the dtype of the scale: (code - top / 2) * step * scale, computed in float32."""
        top = 2.0 ** self.widths.float() - 1
        values = (self.codes.float() - top / 2).mul_(steps(self.widths))
        return values.mul_(self.scale.float()[:, None]).to(self.scale.dtype)

    @property
    def bits(self) -> int:
        """Exact size: codes, widths and scales."""
        rows, columns = self.codes.shape
        codes = rows * int(self.widths.sum(dtype=torch.int64))
        return codes + columns * _MAP_BITS + rows * 8 * self.scale.element_size()

    def rows(self, start: int, stop: int) -> "ColumnWeight":
        """Rows start to stop, with the widths of all rows."""
        return ColumnWeight(self.codes[start:stop], self.widths, self.scale[start:stop])

    @classmethod
    def join(cls, parts: list["ColumnWeight"]) -> "ColumnWeight":
        """One weight from the consecutive pieces of a layer, which have the same widths."""
        assert all(torch.equal(part.widths, parts[0].widths) for part in parts)
        codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
        return cls(codes, parts[0].widths, scale)


class ColumnQuantizer(Method[P]):
    """A way to choose the width of every column of a layer, and the code of every weight.

    Layers are not stacked, because widths belong to one layer. A layer may be solved in pieces of rows: the losses() of
    the pieces are added, widths() are chosen once from the sum, and encode() is called for each piece. Without
    statistics, prepare(None), a method uses the weights alone.
    """

    def check(self, level: ColumnBits) -> None:
        """UserError where the method cannot reach this mean; called before anything is solved."""
        return None

    def cost(self, layers: LayerStack, level: ColumnBits) -> MethodCost | None:
        """Cost of prepare() and of the solve for layers of this shape; None where the method does not state it."""
        return None

    @abstractmethod
    def losses(self, weight: Tensor, prepared: P, level: ColumnBits) -> Tensor:
        """Loss of every column of weight (R, C) at equal bits, summed over the rows, (C,) float64."""

    @abstractmethod
    def widths(self, losses: Tensor, level: ColumnBits) -> Tensor:
        """Bits of every column, (C,) uint8, from the losses (C,) of all rows; their sum is level.total(C)."""

    @abstractmethod
    def encode(self, weight: Tensor, prepared: P, widths: Tensor) -> Result[ColumnWeight]:
        """Quantize weight (R, C), whose dtype is also that of the scales, at these widths (C,)."""

    def quantize(self, weight: Tensor, prepared: P, level: ColumnBits) -> Result[ColumnWeight]:
        """Quantize all rows of a layer, weight (R, C), at once; prepared comes from prepare()."""
        return self.encode(weight, prepared, self.widths(self.losses(weight, prepared, level), level))
