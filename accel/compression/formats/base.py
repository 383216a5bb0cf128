"""Base classes of the formats of compressed checkpoints, and the description of a stored layer that they share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.compression.quantizers.base import QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. name: what follows the layer's or the level's name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


# The shape of the dense weight, part of every packed form that needs it; stored_bits does not include it.
SHAPE = StoredTensor("weight_shape", torch.int64, (2,))


@dataclass(frozen=True)
class LoaderScheme:
    """How loaders read a layer.

    packing: how its codes are packed, by the name of compressed-tensors' compressor. weights: grid of the codes.
    inputs: how the layer's inputs are rounded; None for not at all.
    """

    packing: str
    weights: WeightScheme
    inputs: InputScheme | None = None


class Packing(ABC):
    """How the codes of one layer are stored. name: of compressed-tensors' compressor, which unpacks them."""

    name: str

    @abstractmethod
    def tensors(self, scheme: WeightScheme, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Tensors of a layer (R, C) in a checkpoint of that dtype; known before the layer is solved."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """These tensors, on the CPU, by what follows the layer's name."""


class Format(ABC):
    """How a checkpoint stores quantized layers and describes them in its config, so that loaders read them."""

    @abstractmethod
    def tensors(self, scheme: LoaderScheme, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Tensors of the weight of a layer (R, C) in a checkpoint of that dtype."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight, scheme: LoaderScheme) -> dict[str, Tensor]:
        """Tensors to store for one layer, by what follows the layer's name."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor], scheme: LoaderScheme) -> Tensor:
        """Weight (R, C), as a loader unpacks the stored tensors."""

    @abstractmethod
    def announce(self, schemes: Mapping[str, LoaderScheme], untouched: list[str], experts: bool) -> dict[str, object]:
        """`quantization_config` for config.json.

        schemes: of every quantized layer, by name. untouched: linear layers that are not quantized. experts: whether
        some quantized layers are experts of a mixture.
        """
