"""Base class of the formats of compressed checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from hasten.accel.compression.quantizers.base import QuantizedWeight, Scheme


class Format(ABC):
    """How a checkpoint stores quantized layers and describes them in its config, so that loaders read them."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Tensors to store for one layer, by what follows the layer's name."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """Weight (R, C), as a loader unpacks the stored tensors, in the dtype of the scale."""

    @abstractmethod
    def announce(self, schemes: Mapping[str, Scheme], untouched: list[str], experts: bool) -> dict[str, object]:
        """`quantization_config` for config.json.

        schemes: of every quantized layer, by name. untouched: linear layers that are not quantized. experts: whether
        some quantized layers are experts of a mixture.
        """
