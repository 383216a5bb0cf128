"""Codes whose bits differ by column: `c2.5`, whole bits for every input column that average 2.5.

No loader reads bits that differ by column, so checkpoints hold such layers dense.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.calibration.slabs import row_slabs, slab_of
from hasten.accel.compression.formats import columns as column_format
from hasten.accel.compression.formats.base import SHAPE, StoredTensor
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.method import Method
from hasten.accel.compression.quantizers.columns import ColumnBits, ColumnQuantizer, ColumnWeight
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.models.architecture import Layer

_NAME = re.compile(r"c(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class ColumnBitsLevel(Level):
    """Every weight of a layer as a code whose width depends on its column."""

    bits: ColumnBits

    examples: ClassVar[tuple[str, ...]] = ("c3", "c2.5")
    family: ClassVar[type] = ColumnQuantizer

    @classmethod
    def parse(cls, name: str) -> "ColumnBitsLevel | None":
        """Level of a name like c2.5."""
        match = _NAME.fullmatch(name)
        return cls(ColumnBits(float(match[1]))) if match else None

    @property
    def name(self) -> str:
        """`c2.5`, with all digits, because the size depends on them."""
        return f"c{str(self.bits.mean).removesuffix('.0')}"

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Codes, 4 bits a column for their widths, and one scale a row."""
        return self.bits.stored_bits(rows, columns, itemsize)

    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """The codes of all widths are one tensor here; in the file each width has one, which may add a byte each."""
        return [
            SHAPE,
            StoredTensor("scale", dtype, (rows,)),
            StoredTensor("widths", torch.uint8, (ceil(columns / 2),)),
            StoredTensor("codes", torch.uint8, (ceil(rows * self.bits.total(columns) / 8),)),
        ]

    def pack(self, weight: CompressedWeight) -> dict[str, Tensor]:
        """See formats.columns."""
        assert isinstance(weight, ColumnWeight)
        return column_format.pack(weight)

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight in the dtype of the scales."""
        return column_format.unpack(stored).dequantize()

    def facts(self, weight: CompressedWeight) -> dict[str, object]:
        """Mean bits, and the number of columns of each width."""
        assert isinstance(weight, ColumnWeight)
        counts = torch.bincount(weight.widths.long()).tolist()
        return {
            "bits": float(weight.widths.double().mean()),
            "columns_of_bits": {str(width): count for width, count in enumerate(counts) if count},
        }

    def check_method(self, method: Method) -> None:
        """UserError where the mean is outside the method's bounds."""
        assert isinstance(method, ColumnQuantizer)
        method.check(self.bits)

    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """The method itself, which then uses the weights alone."""
        return method, "rounded to nearest"

    def cost(self, method: Method, layers: LayerStack) -> MethodCost | None:
        """The cost that the method states."""
        assert isinstance(method, ColumnQuantizer)
        return method.cost(layers, self.bits)

    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Quantize all rows of one layer, weight (R, C)."""
        assert isinstance(method, ColumnQuantizer)
        return method.quantize(weight, prepared, self.bits)

    def solve(
        self, method: Method, layers: Sequence[Layer], read: Callable[[Layer], Tensor], prepared: object, device: str
    ) -> dict[str, Result[CompressedWeight]]:
        """Compress layers one by one, because the widths of the columns are chosen for the rows of one layer.

        There are two passes over a layer, in slabs that depend only on its shape and the device.
        """
        assert isinstance(method, ColumnQuantizer)
        solved: dict[str, Result[CompressedWeight]] = {}
        for layer in layers:
            weight = read(layer)
            shape = (layer.name, layer.rows, layer.columns)
            pieces = [rows for slab in row_slabs([shape], slab_of(device)) for _, rows in slab]
            losses = torch.zeros(layer.columns, dtype=torch.float64, device=device)
            for rows in pieces:
                losses += method.losses(weight[rows].to(device), prepared, self.bits)
            widths = method.widths(losses, self.bits)
            solved[layer.name] = Result.join(
                [method.encode(weight[rows].to(device), prepared, widths) for rows in pieces]
            )
        return solved
