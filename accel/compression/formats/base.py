"""What a format of compressed checkpoints must be able to do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from hasten.accel.compression.quantizers.base import QuantizedWeight, Scheme


class Format(ABC):
    """How quantized layers are stored and announced, so that others load them."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Tensors to store for one layer, by what follows the layer's name."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """Weight (R, C) that a loader makes of the stored tensors, in the dtype of the scale."""

    @abstractmethod
    def announce(self, schemes: Mapping[str, Scheme], untouched: list[str], experts: bool) -> dict[str, object]:
        """`quantization_config` for config.json.

        schemes: of every quantized layer, by name. untouched: linear layers that were left alone. experts: whether some
        quantized layers are experts of a mixture.
        """
