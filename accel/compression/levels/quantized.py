"""Base of the kinds of levels that store all weights of a layer as codes on one grid, in a form that loaders read."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.compression.formats.base import LoaderScheme, StoredTensor
from hasten.accel.compression.formats.compressed_tensors import CompressedTensors
from hasten.accel.compression.levels.base import Level, solve_rows
from hasten.accel.compression.method import Method
from hasten.accel.compression.quantizers.base import QuantizedWeight, Quantizer, WeightScheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Layer

_FORMAT = CompressedTensors()


class QuantizedLevel(Level):
    """All weights of a layer as codes on one grid. Level databases and checkpoints store the same tensors."""

    family: ClassVar[type] = Quantizer
    is_loaded_packed: ClassVar[bool] = True

    @property
    @abstractmethod
    def loader_scheme(self) -> LoaderScheme:
        """How loaders read the layer; it defines the level."""

    @property
    def grid(self) -> WeightScheme:
        """The grid of the weights."""
        return self.loader_scheme.weights

    @property
    def inputs(self) -> InputScheme | None:
        """How the layer's inputs are rounded."""
        return self.loader_scheme.inputs

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Codes, scales and zero points."""
        return self.grid.stored_bits(rows, columns, itemsize)

    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Those of the checkpoint."""
        return _FORMAT.tensors(self.loader_scheme, rows, columns, dtype)

    def check(self, layer: str, columns: int) -> None:
        """UserError where the size of groups or blocks does not divide the layer's columns."""
        if not self.grid.fits(columns):
            raise UserError(
                f"level {self.name} needs a multiple of {self.grid.group_size} columns, {layer} has {columns}: ignore "
                "the layer"
            )

    def pack(self, weight: CompressedWeight) -> dict[str, Tensor]:
        """See formats.compressed_tensors."""
        assert isinstance(weight, QuantizedWeight)
        return _FORMAT.pack(weight, self.loader_scheme)

    def dense(self, weight: CompressedWeight) -> Tensor:
        """The weight on its device; unpacking rounds alike."""
        assert isinstance(weight, QuantizedWeight)
        return weight.dequantize()

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight as a loader unpacks it."""
        return _FORMAT.unpack(stored, self.stored(stored))

    def stored(self, stored: Mapping[str, Tensor]) -> LoaderScheme:
        """How loaders read these stored tensors, which tell what the level leaves open, such as a group size `auto`."""
        return self.loader_scheme

    def checkpoint_tensors(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors themselves."""
        return dict(stored)

    def facts(self, weight: CompressedWeight) -> dict[str, object]:
        """The grid by which the weight was quantized."""
        assert isinstance(weight, QuantizedWeight)
        grid = weight.scheme
        return {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}

    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """Round to nearest."""
        return RoundToNearest(), "rounded to nearest"

    def cost(self, method: Method, layers: LayerStack) -> MethodCost | None:
        """The cost that the method states."""
        assert isinstance(method, Quantizer)
        return method.cost(layers, self.grid)

    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Quantize weight (R, C), which is all that shares a scale."""
        assert isinstance(method, Quantizer)
        return method.quantize(weight, prepared, self.grid)

    def solve(
        self, method: Method, layers: Sequence[Layer], read: Callable[[Layer], Tensor], prepared: object, device: str
    ) -> dict[str, Result[CompressedWeight]]:
        """Compress layers that share an input, and so are fused by servers: a scale of the tensor is that of all."""
        assert isinstance(method, Quantizer)
        grid = self.grid
        if grid.is_shared:
            grid = grid.of_layers(max(float(read(layer).abs().max()) for layer in layers))

        def make(weight: Tensor) -> Result[CompressedWeight]:
            return method.quantize(weight, prepared, grid)

        return solve_rows(make, layers, read, device, grid.block_rows)


@dataclass(frozen=True)
class NamedLevel(QuantizedLevel):
    """A level of a kind that has a few levels, each with its name. variants: all levels of the kind, by name."""

    variant: str

    variants: ClassVar[Mapping[str, LoaderScheme]]

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Level of a name among the variants."""
        return cls(name) if name in cls.variants else None

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.variant

    @property
    def loader_scheme(self) -> LoaderScheme:
        """The variant."""
        return self.variants[self.variant]
