"""Codes on a uniform grid: `w3g128`, 3 bits with groups of 128; `w3`, one scale a row; `w3g128a`, with zero points.

The size of the groups of `w3gauto` depends on the columns of a layer, see calibration/group_sizes.py.

Level databases and checkpoints store it as compressed-tensors' `pack-quantized`, which transformers and vLLM load.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.formats.pack_quantized import PackQuantized, zero_point_words
from hasten.accel.compression.levels.base import SHAPE, AutoSize, Level, StoredTensor
from hasten.accel.compression.method import Method
from hasten.accel.compression.quantizers.base import AUTO, QuantizedWeight, Quantizer, Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.costs.method import LayerStack, MethodCost

_NAME = re.compile(r"w(\d+)(?:g(\d+|auto))?(a?)")
_FORMAT = PackQuantized()


@dataclass(frozen=True)
class GridLevel(Level):
    """All weights of a layer as codes on one grid."""

    scheme: Scheme

    examples: ClassVar[tuple[str, ...]] = ("w4g128", "w3", "w4g128a")
    family: ClassVar[type] = Quantizer
    is_loaded_packed: ClassVar[bool] = True

    @classmethod
    def parse(cls, name: str) -> "GridLevel | None":
        """Level of a name like w4g128."""
        match = _NAME.fullmatch(name)
        return cls(Scheme(int(match[1]), group_size(match[2]), symmetric=not match[3])) if match else None

    @property
    def name(self) -> str:
        """`w3g128`; without `g` one scale a row, with `a` at the end zero points."""
        scheme = self.scheme
        return f"w{scheme.bits}{scheme.suffix}{'' if scheme.symmetric else 'a'}"

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Codes, scales and zero points."""
        return self.scheme.stored_bits(rows, columns, itemsize)

    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Codes in 32-bit words, each row padded to whole words; zero points likewise, padded for each group."""
        return grid_tensors(self.scheme, rows, columns, dtype)

    def check(self, layer: str, columns: int) -> None:
        """UserError where group_size does not divide the layer's columns."""
        self.scheme.check(layer, columns)

    def of_group_size(self, size: AutoSize) -> "GridLevel":
        """The level with a size in place of `auto`; with zero points the one that all layers share."""
        return GridLevel(self.scheme.of_group_size(size.own if self.scheme.symmetric else size.shared))

    def of_expert(self) -> "GridLevel":
        """The symmetric level, because transformers cannot read zero points of fused experts."""
        return GridLevel(Scheme(self.scheme.bits, self.scheme.group_size, symmetric=True))

    def options(self) -> dict[str, int | float | str | bool]:
        """bits, group_size and symmetric."""
        return asdict(self.scheme)

    def pack(self, weight: CompressedWeight) -> dict[str, Tensor]:
        """See formats.pack_quantized."""
        assert isinstance(weight, QuantizedWeight)
        return _FORMAT.pack(weight)

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight as a loader unpacks it. Stored tensors tell the groups, and whether there are zero points."""
        scheme = self.scheme.of_group_size(stored_group_size(stored["weight_shape"], stored["weight_scale"]))
        scheme = replace(scheme, symmetric="weight_zero_point" not in stored)
        return _FORMAT.unpack(stored, scheme)

    def dense(self, weight: CompressedWeight) -> Tensor:
        """The weight on its device; unpacking rounds alike."""
        assert isinstance(weight, QuantizedWeight)
        return weight.dequantize()

    @property
    def loader_scheme(self) -> Scheme:
        """The grid itself."""
        return self.scheme

    def checkpoint_tensors(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors themselves."""
        return dict(stored)

    def facts(self, weight: CompressedWeight) -> dict[str, object]:
        """The scheme by which the weight was quantized."""
        assert isinstance(weight, QuantizedWeight)
        return asdict(weight.scheme)

    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """Round to nearest."""
        return RoundToNearest(), "rounded to nearest"

    def cost(self, method: Method, layers: LayerStack) -> MethodCost | None:
        """The cost that the method states."""
        assert isinstance(method, Quantizer)
        return method.cost(layers, self.scheme)

    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Quantize weight (R, C)."""
        assert isinstance(method, Quantizer)
        return method.quantize(weight, prepared, self.scheme)


def group_size(text: str | None) -> int | str:
    """Group size of a level's name; None is one scale a row."""
    return text if text == AUTO else int(text or -1)


def stored_group_size(shape: Tensor, scale: Tensor) -> int:
    """Group size of stored scales (R, G) of a weight whose shape (2,) is stored, too."""
    columns, groups = int(shape[1]), scale.shape[1]
    return -1 if groups == 1 else columns // groups


def grid_tensors(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
    """Tensors of a layer (R, C), with scales of that dtype, in the format pack-quantized."""
    groups = columns // scheme.columns(columns)
    tensors = [
        SHAPE,
        StoredTensor("weight_packed", torch.int32, (rows, ceil(columns * scheme.bits / 32))),
        StoredTensor("weight_scale", dtype, (rows, groups)),
    ]
    if not scheme.symmetric:
        words = zero_point_words(rows, groups, scheme.bits)
        tensors.append(StoredTensor("weight_zero_point", torch.int32, (words, groups)))
    return tensors
