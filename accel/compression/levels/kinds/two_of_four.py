"""2:4 sparsity: `s2of4`, two of every four input weights of a row are zero; `s2of4w4g128`, the others are quantized.

Source: Mishra et al. 2021, arXiv:2104.08378; joint with quantization: Frantar & Alistarh 2023, arXiv:2301.00774,
section 3.5 (SparseGPT), where later columns compensate for the rounding, too. Wanda and magnitude pruning round the
kept weights without compensation. The grid is symmetric, so that code 2**(bits - 1) is exactly zero. It is searched on
the weights that the method keeps in a first run without a grid; a second run of the method rounds to it. The paper's
code uses the range of all weights.

Exact bits: for every four weights two 2-bit indices and two values or codes; and the scales. s2of4 of bfloat16 takes
9 bits a weight, s2of4w4g128 3.125. No loader reads the 2:4 form: checkpoints hold s2of4 dense, and the quantized level
as dense codes (pack-quantized), whose zeros are exact.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.calibration.inputs import without
from hasten.accel.compression.formats import two_of_four
from hasten.accel.compression.formats.base import SHAPE, LoaderScheme, StoredTensor
from hasten.accel.compression.formats.compressed_tensors import INTEGERS
from hasten.accel.compression.formats.pack_quantized import PackQuantized
from hasten.accel.compression.levels.base import AutoSize, Level
from hasten.accel.compression.levels.kinds.grid import group_size, stored_group_size
from hasten.accel.compression.method import Method
from hasten.accel.compression.pruners.base import PrunedWeight, Pruner
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.pruners.n_of_m import NOfM
from hasten.accel.compression.quantizers.base import QuantizedWeight, Scheme, WeightScheme
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.costs.method import LayerStack, MethodCost, range_search
from hasten.accel.errors import UserError

_NAME = re.compile(r"s2of4(?:w(\d+)(?:g(\d+|auto))?)?")
_PATTERN = NOfM(2, 4)
# Number of ranges tried for each scale, and the smallest of them, as in GPTQ.
_SEARCH, _SHRINK = 24, 0.4


@dataclass(frozen=True)
class TwoOfFourWeight:
    """A 2:4 sparse weight (R, C); quantized: the same weight as codes, None where it is not quantized."""

    pruned: PrunedWeight
    quantized: QuantizedWeight | None = None

    @property
    def bits(self) -> int:
        """Exact size: indices, and values or codes and scales."""
        rows, columns = self.pruned.mask.shape
        scheme = None if self.quantized is None else self.quantized.scheme
        return _bits(rows, columns, self.pruned.weight.element_size(), scheme)

    def rows(self, start: int, stop: int) -> "TwoOfFourWeight":
        """Rows start to stop, such as those of one of several layers that were pruned together."""
        codes = self.quantized
        return TwoOfFourWeight(self.pruned.rows(start, stop), None if codes is None else codes.rows(start, stop))

    @classmethod
    def join(cls, parts: list["TwoOfFourWeight"]) -> "TwoOfFourWeight":
        """One weight from its consecutive pieces."""
        codes = [part.quantized for part in parts if part.quantized is not None]
        return cls(PrunedWeight.join([part.pruned for part in parts]), QuantizedWeight.join(codes) if codes else None)


@dataclass(frozen=True)
class TwoOfFourLevel(Level):
    """Two of every four weights, and their indices. scheme: symmetric grid of the kept weights; None: not quantized."""

    scheme: Scheme | None = None

    examples: ClassVar[tuple[str, ...]] = ("s2of4", "s2of4w4g128", "s2of4w3")
    family: ClassVar[type] = Pruner

    @classmethod
    def parse(cls, name: str) -> "TwoOfFourLevel | None":
        """Level of a name like s2of4 or s2of4w4g128; without `g` one scale a row."""
        match = _NAME.fullmatch(name)
        if not match:
            return None
        return cls(Scheme(int(match[1]), group_size(match[2]), symmetric=True) if match[1] else None)

    @property
    def name(self) -> str:
        """`s2of4`, followed by the grid of the kept weights; its group_size counts all columns, kept or not."""
        if self.scheme is None:
            return "s2of4"
        return f"s2of4w{self.scheme.bits}{self.scheme.suffix}"

    def check(self, layer: str, columns: int) -> None:
        """UserError where the number of columns is not a multiple of 4 and of group_size."""
        if columns % 4:
            raise UserError(f"level {self.name} needs a multiple of 4 columns, {layer} has {columns}: ignore the layer")
        if self.scheme is not None:
            self.scheme.check(layer, columns)

    def of_group_size(self, size: AutoSize) -> "TwoOfFourLevel":
        """The level with the layer's own size in place of `auto`."""
        return self if self.scheme is None else TwoOfFourLevel(self.scheme.of_group_size(size.own))

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Indices (one bit for every weight), half of the weights as values or codes, and scales."""
        return _bits(rows, columns, itemsize, self.scheme)

    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Indices, and values or codes and scales; rows of indices and of codes are padded to whole bytes."""
        tensors = [SHAPE, StoredTensor("indices", torch.uint8, (rows, ceil(columns / 8)))]
        if self.scheme is None:
            return [*tensors, StoredTensor("values", dtype, (rows, columns // 2))]
        return [
            *tensors,
            StoredTensor("codes", torch.uint8, (rows, ceil(columns // 2 * self.scheme.bits / 8))),
            StoredTensor("scale", dtype, (rows, columns // self.scheme.columns(columns))),
        ]

    def pack(self, weight: CompressedWeight) -> dict[str, Tensor]:
        """See formats.two_of_four."""
        assert isinstance(weight, TwoOfFourWeight)
        mask, codes = weight.pruned.mask, weight.quantized
        stored = {"weight_shape": torch.tensor(mask.shape), "indices": two_of_four.pack_mask(mask)}
        if codes is None:
            return stored | {"values": two_of_four.kept(weight.pruned.weight, mask).cpu()}
        packed = two_of_four.pack_codes(two_of_four.kept(codes.codes, mask), codes.scheme.bits)
        return stored | {"codes": packed, "scale": codes.scale.cpu().contiguous()}

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight with its zeros."""
        if self.scheme is None:
            return two_of_four.spread(stored["values"], self._mask(stored))
        return self._codes(stored, self.scheme).dequantize()

    @property
    def loader_scheme(self) -> LoaderScheme | None:
        """The grid of the kept weights, which represents zeros exactly."""
        return None if self.scheme is None else LoaderScheme(INTEGERS, self.scheme)

    def checkpoint_tensors(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dense codes where there is a grid, else the dense weight."""
        if self.scheme is None:
            return {"weight": self.unpack(stored)}
        return PackQuantized().pack(self._codes(stored, self.scheme))

    def facts(self, weight: CompressedWeight) -> dict[str, object]:
        """Bits of a kept weight, its grid, and the share of zeros."""
        assert isinstance(weight, TwoOfFourWeight)
        kept = {"bits": 8 * weight.pruned.weight.element_size()} if self.scheme is None else asdict(self.scheme)
        return {**kept, "sparsity": 0.5}

    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """Magnitude pruning."""
        return Magnitude(), "pruned by magnitude"

    def cost(self, method: Method, layers: LayerStack) -> MethodCost | None:
        """The cost that the method states; where kept weights are quantized, twice that and the search of the grid."""
        assert isinstance(method, Pruner)
        stated = method.cost(layers, _PATTERN)
        if stated is None or self.scheme is None:
            return stated
        return replace(stated, solve=stated.solve * 2 + range_search(layers, 2 * _SEARCH))

    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Prune weight (R, C), and quantize the kept weights where the level has a grid."""
        assert isinstance(method, Pruner)
        pruned = method.prune(weight, prepared, _PATTERN)
        codes = None
        if self.scheme is not None:
            kept = without(pruned.weight.weight, method.dead_columns(prepared))
            grid = Grid.of(kept, self.scheme, _SEARCH, _SHRINK)
            pruned = method.prune(weight, prepared, _PATTERN, grid)
            codes = grid.quantize(pruned.weight.weight)
        made = TwoOfFourWeight(pruned.weight, codes)
        return Result(made, pruned.error, pruned.power, pruned.notes, pruned.of_output)

    @staticmethod
    def _mask(stored: Mapping[str, Tensor]) -> Tensor:
        return two_of_four.unpack_mask(stored["indices"], int(stored["weight_shape"][1]))

    def _codes(self, stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        mask, middle = self._mask(stored), 2 ** (scheme.bits - 1)
        scheme = scheme.of_group_size(stored_group_size(stored["weight_shape"], stored["scale"]))
        kept = two_of_four.unpack_codes(stored["codes"], scheme.bits, mask.shape[1] // 2)
        codes = two_of_four.spread(kept, mask, middle)
        return QuantizedWeight(
            codes, stored["scale"], torch.full(stored["scale"].shape, middle, dtype=torch.uint8), scheme
        )


def _bits(rows: int, columns: int, itemsize: int, scheme: WeightScheme | None) -> int:
    """Exact size: two 2-bit indices for every four weights, values or codes of half of the weights, and scales."""
    weights = rows * columns
    if scheme is None:
        return weights + weights // 2 * 8 * itemsize
    return weights + weights // 2 * scheme.bits + rows * (columns // scheme.columns(columns)) * 8 * itemsize
