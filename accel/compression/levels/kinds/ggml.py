"""ggml's block types, which llama.cpp loads from GGUF files: `q4_k`, `q6_k`, `q8_0` and so on.

A matrix whose columns are no multiple of 256 gets, in place of a K-quant, the type of 32 columns that llama.cpp takes.
Level databases and GGUF files hold the same bytes; other checkpoints hold the dense weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.formats.base import SHAPE, StoredTensor
from hasten.accel.compression.levels.base import Level
from hasten.accel.compression.method import Method
from hasten.accel.compression.quantizers.base import Quantizer
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError
from hasten.accel.models.ggml.base import BlockType, BlockWeight
from hasten.accel.models.ggml.types import TYPES, type_for

_BLOCKS, _DTYPE = "blocks", "dtype"


@dataclass(frozen=True)
class GgmlLevel(Level):
    """All weights of a layer in one block type."""

    kind: type[BlockType]

    examples: ClassVar[tuple[str, ...]] = ("q4_k", "q3_k", "q5_0")
    family: ClassVar[type] = Quantizer

    @classmethod
    def parse(cls, name: str) -> "GgmlLevel | None":
        """Level of a type's name in GGUF, in lower case."""
        return cls(TYPES[name]) if name in TYPES else None

    @property
    def name(self) -> str:
        """The type's name."""
        return self.kind.name

    def ggml_type(self, columns: int) -> type[BlockType]:
        """The level's type, or the one in its place where a layer has this many columns."""
        kind = type_for(self.kind, columns)
        assert kind is not None, "check refuses such layers"
        return kind

    def check(self, layer: str, columns: int) -> None:
        """UserError where no type of these blocks divides the columns."""
        if type_for(self.kind, columns) is None:
            raise UserError(
                f"level {self.name} needs a multiple of 32 columns, {layer} has {columns}: ignore the layer"
            )

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """The bytes of the blocks."""
        return 8 * rows * self.ggml_type(columns).row_bytes(columns)

    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """The blocks, and an empty tensor of the checkpoint's dtype."""
        row_bytes = self.ggml_type(columns).row_bytes(columns)
        return [SHAPE, StoredTensor(_BLOCKS, torch.uint8, (rows, row_bytes)), StoredTensor(_DTYPE, dtype, (0,))]

    def pack(self, weight: CompressedWeight) -> dict[str, Tensor]:
        """The blocks as they are."""
        assert isinstance(weight, BlockWeight)
        rows, row_bytes = weight.blocks.shape
        columns = row_bytes // weight.kind.nbytes * weight.kind.columns
        return {
            "weight_shape": torch.tensor([rows, columns]),
            _BLOCKS: weight.blocks.cpu().contiguous(),
            _DTYPE: torch.empty(0, dtype=weight.dtype),
        }

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight as llama.cpp dequantizes it, rounded to the checkpoint's dtype, of which errors are.

        llama.cpp computes with the exact values: in bfloat16, the rounding adds a fifth to the error of 8 bits.
        """
        kind = self.ggml_type(int(stored["weight_shape"][1]))
        return kind.dequantize(stored[_BLOCKS]).to(stored[_DTYPE].dtype)

    def facts(self, weight: CompressedWeight) -> dict[str, object]:
        """Bits of a weight, scales included, and the type, which in narrow layers is not the level's."""
        assert isinstance(weight, BlockWeight)
        return {"bits": 8 * weight.kind.nbytes / weight.kind.columns, "type": weight.kind.name}

    def check_method(self, method: Method) -> None:
        """UserError where the quantizer cannot round to block types."""
        assert isinstance(method, Quantizer)
        if type(method).quantize_blocks is Quantizer.quantize_blocks:
            raise UserError(
                f"level {self.name} cannot be made by {type(method).__name__}: use gptq or round_to_nearest"
            )

    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """Round to nearest."""
        return RoundToNearest(), "rounded to nearest"

    def cost(self, method: Method, layers: LayerStack) -> MethodCost | None:
        """The cost that the method states."""
        assert isinstance(method, Quantizer)
        return method.blocks_cost(layers, self.ggml_type(layers.columns))

    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Quantize weight (R, C)."""
        assert isinstance(method, Quantizer)
        kind = self.ggml_type(weight.shape[1])
        result = method.quantize_blocks(weight, prepared, kind)
        notes = result.notes
        if kind is not self.kind:
            notes = (*notes, f"{weight.shape[1]} columns are no multiple of {self.kind.columns}: {kind.name}")
        return Result(result.weight, result.error, result.power, notes, result.of_output)
