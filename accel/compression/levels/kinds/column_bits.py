"""Codes whose bits differ by column: `c2.5`, whole bits for every input column that average 2.5.

No loader reads bits that differ by column: a checkpoint has such layers dense.
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
from hasten.accel.compression.levels.base import SHAPE, Level, StoredTensor
from hasten.accel.compression.method import Method
from hasten.accel.compression.quantizers.columns import ColumnBits, ColumnQuantizer, ColumnWeight
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.models.architecture import Layer

_NAME = re.compile(r"c(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class ColumnBitsLevel(Level):
    """Every weight of a layer as a code in the bits of its column."""

    bits: ColumnBits

    examples: ClassVar[tuple[str, ...]] = ("c3", "c2.5")
    family: ClassVar[type] = ColumnQuantizer

    @classmethod
    def parse(cls, name: str) -> "ColumnBitsLevel | None":
        """Level of a name like c2.5."""
        found = _NAME.fullmatch(name)
        return cls(ColumnBits(float(found[1]))) if found else None

    @property
    def name(self) -> str:
        """`c2.5`, with all digits: the size depends on them."""
        return f"c{str(self.bits.mean).removesuffix('.0')}"

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Codes, 4 bits a column for their widths, and one scale a row."""
        return self.bits.stored_bits(rows, columns, itemsize)

    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """The codes count as one tensor, though there is one for every width, by an error of a byte each."""
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
        """Mean bits, and how many columns have how many."""
        assert isinstance(weight, ColumnWeight)
        of_width = torch.bincount(weight.widths.long()).tolist()
        return {
            "bits": float(weight.widths.double().mean()),
            "columns_of_bits": {str(width): count for width, count in enumerate(of_width) if count},
        }

    def check_method(self, method: Method) -> None:
        """UserError where the method's bounds leave no such mean."""
        assert isinstance(method, ColumnQuantizer)
        method.check(self.bits)

    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """The method itself, which then goes by the weights alone."""
        return method, "rounded to nearest"

    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Quantize all rows of one layer, weight (R, C)."""
        assert isinstance(method, ColumnQuantizer)
        return method.quantize(weight, prepared, self.bits)

    def solve(
        self, method: Method, layers: Sequence[Layer], read: Callable[[Layer], Tensor], prepared: object, device: str
    ) -> dict[str, Result[CompressedWeight]]:
        """Compress layers one by one, as the columns' widths are chosen for all rows of a layer and no others.

        A layer is read twice, in slabs that depend on nothing but its shape and the device.
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
