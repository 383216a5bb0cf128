"""What every quantizer takes and gives back that spreads a layer's bits over its columns."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.method import Method, P
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError

MIN_WIDTH, MAX_WIDTH = 1, 8
# Of each column, how many bits its codes have: 1 to 8, in half a byte.
_MAP_BITS = 4
# Steps, by bits, of the uniform quantizers that err least on normal numbers of variance 1 (Max 1960). Part of the
# stored form: a row holds one scale, and the steps of all its columns follow from it.
_STEPS = (0.0, 1.595769, 0.995687, 0.586019, 0.335201, 0.188139, 0.104063, 0.056868, 0.030762)


@dataclass(frozen=True)
class ColumnBits:
    """Whole bits for every column of a layer, as many as are chosen for it, that average `mean` over the columns."""

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
    """Distance of neighbouring values in columns of these widths (C,) where a row's scale is 1, (C,) float32."""
    return torch.tensor(_STEPS, device=widths.device)[widths.long()]


@dataclass(frozen=True)
class ColumnWeight:
    """Codes of a weight (R, C) whose columns have widths of their own, and what turns them back.

    codes: (R, C) uint8, below 2**width of their column. widths: (C,) uint8, bits. scale: (R,) in the dtype it is stored
    in. Values lie on both sides of zero alike, and none is zero unless the row's scale is.
    """

    codes: Tensor
    widths: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Weight (R, C) in the dtype of the scale: (code - top / 2) step, rounded once, from float32."""
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
        """Some of the rows; the widths are those of all."""
        return ColumnWeight(self.codes[start:stop], self.widths, self.scale[start:stop])

    @classmethod
    def join(cls, parts: list["ColumnWeight"]) -> "ColumnWeight":
        """Consecutive rows of one layer."""
        assert all(torch.equal(part.widths, parts[0].widths) for part in parts)
        codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
        return cls(codes, parts[0].widths, scale)


class ColumnQuantizer(Method[P]):
    """A way to give every column of one layer its bits, and every weight its code.

    Widths are a layer's own, so layers are not stacked. Rows may come in pieces: losses() of the pieces add up,
    widths() are chosen once for all of them, and encode() takes them piece by piece. Without statistics, prepare(None),
    a method goes by the weights alone.
    """

    def check(self, level: ColumnBits) -> None:
        """UserError where the method cannot end at this level; known before anything is solved."""
        return None

    def cost(self, layers: LayerStack, level: ColumnBits) -> MethodCost | None:
        """What prepare() and the solve of layers of this shape take; None where the method does not state it."""
        return None

    @abstractmethod
    def losses(self, weight: Tensor, prepared: P, level: ColumnBits) -> Tensor:
        """Loss of every column of weight (R, C) at equal bits, summed over the rows, (C,) float64."""

    @abstractmethod
    def widths(self, losses: Tensor, level: ColumnBits) -> Tensor:
        """Bits of every column, (C,) uint8, from the losses of all rows (C,); level.total(C) together."""

    @abstractmethod
    def encode(self, weight: Tensor, prepared: P, widths: Tensor) -> Result[ColumnWeight]:
        """Quantize weight (R, C), whose dtype is also that of the scales, at these widths (C,)."""

    def quantize(self, weight: Tensor, prepared: P, level: ColumnBits) -> Result[ColumnWeight]:
        """Quantize all rows of a layer, weight (R, C), at once; prepared comes from prepare()."""
        return self.encode(weight, prepared, self.widths(self.losses(weight, prepared, level), level))
