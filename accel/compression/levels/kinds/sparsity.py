"""Unstructured sparsity: `s50`, in every row 50 % of the weights are zero.

No loader reads unstructured sparse weights any more, so checkpoints hold such layers dense.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.formats import bitmask
from hasten.accel.compression.formats.base import SHAPE, StoredTensor
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.method import Method
from hasten.accel.compression.pruners.base import PrunedWeight, Pruner, Sparsity
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.costs.method import LayerStack, MethodCost

_NAME = re.compile(r"s(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class SparsityLevel(Level):
    """The kept weights of a layer, in the checkpoint's dtype, and a mask."""

    sparsity: Sparsity

    examples: ClassVar[tuple[str, ...]] = ("s50", "s37.5")
    family: ClassVar[type] = Pruner

    @classmethod
    def parse(cls, name: str) -> "SparsityLevel | None":
        """Level of a name like s50, rounded to the digits of a name, so that the level has the name it is parsed from.

        None where the name is not of this kind.
        """
        match = _NAME.fullmatch(name)
        return cls(Sparsity(round(float(match[1]) / 100, 8))) if match else None

    @property
    def name(self) -> str:
        """`s50`: percent, with six digits at most."""
        return f"s{100 * self.sparsity.fraction:.6g}"

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """One mask bit for every weight, and the kept values."""
        return self.sparsity.stored_bits(rows, columns, itemsize)

    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Values and mask; each row of the mask is padded to whole bytes."""
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
        """Bits of a kept value, and the share of zeros."""
        assert isinstance(weight, PrunedWeight)
        kept = float(weight.mask.sum()) / weight.mask.numel()
        return {"bits": 8 * weight.weight.element_size(), "sparsity": 1 - kept}

    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """Magnitude pruning."""
        return Magnitude(), "pruned by magnitude"

    def cost(self, method: Method, layers: LayerStack) -> MethodCost | None:
        """The cost that the method states."""
        assert isinstance(method, Pruner)
        return method.cost(layers, self.sparsity)

    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Prune weight (R, C)."""
        assert isinstance(method, Pruner)
        return method.prune(weight, prepared, self.sparsity)
