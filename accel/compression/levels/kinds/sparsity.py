"""Unstructured sparsity: `s50`, in every row 50 % of the weights are zero.

No loader reads sparse weights without structure any more: a checkpoint has such layers dense.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.formats import bitmask
from hasten.accel.compression.levels.base import SHAPE, Level, StoredTensor
from hasten.accel.compression.method import Method
from hasten.accel.compression.pruners.base import PrunedWeight, Pruner, Sparsity
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.result import CompressedWeight, Result

_NAME = re.compile(r"s(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class SparsityLevel(Level):
    """The weights of a layer that are left, in the checkpoint's dtype, and a mask."""

    sparsity: Sparsity

    examples: ClassVar[tuple[str, ...]] = ("s50", "s37.5")
    family: ClassVar[type] = Pruner

    @classmethod
    def parse(cls, name: str) -> "SparsityLevel | None":
        """Level of a name like s50; as many digits as a name has, so that it has the name it was parsed from."""
        found = _NAME.fullmatch(name)
        return cls(Sparsity(round(float(found[1]) / 100, 8))) if found else None

    @property
    def name(self) -> str:
        """`s50`: percent, to six digits."""
        return f"s{100 * self.sparsity.fraction:.6g}"

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """A bit of mask for every weight, and the values that are kept."""
        return self.sparsity.stored_bits(rows, columns, itemsize)

    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Each row of the mask takes whole bytes."""
        kept = rows * (columns - self.sparsity.pruned(columns))
        return [
            SHAPE,
            StoredTensor("values", dtype, (kept,)),
            StoredTensor("mask", torch.uint8, (rows, ceil(columns / 8))),
        ]

    def pack(self, weight: CompressedWeight) -> dict[str, Tensor]:
        """See formats.bitmask."""
        assert isinstance(weight, PrunedWeight)
        return bitmask.pack(weight)

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight with its zeros."""
        return bitmask.unpack(stored)

    def facts(self, weight: CompressedWeight) -> dict[str, object]:
        """Bits of a value that is kept, and the share of zeros."""
        assert isinstance(weight, PrunedWeight)
        kept = float(weight.mask.sum()) / weight.mask.numel()
        return {"bits": 8 * weight.weight.element_size(), "sparsity": 1 - kept}

    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """By magnitude."""
        return Magnitude(), "pruned by magnitude"

    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Prune weight (R, C)."""
        assert isinstance(method, Pruner)
        return method.prune(weight, prepared, self.sparsity)
