"""A checkpoint whose tensors are changed while they are read from another one."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.accel.activations.hadamard import InputHadamard
from hasten.accel.activations.rounding import InputRounding
from hasten.accel.models.checkpoint import Checkpoint
from hasten.kernels.packed_weight import PackedWeight

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs


class CheckpointView(Checkpoint):
    """Reads all from `source`; subclasses change tensors, and maybe their names."""

    def __init__(self, source: Checkpoint) -> None:
        # The state of the source, for what is not overridden.
        vars(self).update(vars(source))
        self.source = source

    @property
    def names(self) -> list[str]:
        """See Checkpoint."""
        return self.source.names

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def shape(self, name: str) -> tuple[int, ...]:
        """See Checkpoint."""
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return self.source.dtype(name)

    def stored_bytes(self, name: str) -> int:
        """See Checkpoint."""
        return self.source.stored_bytes(name)

    def is_packed(self, name: str) -> bool:
        """See Checkpoint."""
        return self.source.is_packed(name)

    def is_quantized(self, name: str) -> bool:
        """See Checkpoint."""
        return self.source.is_quantized(name)

    def quantization(self, name: str) -> "QuantizationArgs | None":
        """See Checkpoint."""
        return self.source.quantization(name)

    def inputs(self, layer: str) -> InputRounding | None:
        """See Checkpoint."""
        return self.source.inputs(layer)

    def input_rotation(self, layer: str) -> InputHadamard | None:
        """See Checkpoint."""
        return self.source.input_rotation(layer)

    def attention(self, name: str, classes: Collection[str]) -> dict[str, InputRounding]:
        """See Checkpoint."""
        return self.source.attention(name, classes)

    def packed(self, name: str) -> PackedWeight:
        """See Checkpoint."""
        return self.source.packed(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See Checkpoint."""
        return self.source.tensor(name, dtype)

    def has_rows(self, name: str) -> bool:
        """See Checkpoint."""
        return self.source.has_rows(name)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """See Checkpoint."""
        return self.source.rows(name, index)

    def row_range(self, name: str, first: int, last: int) -> Tensor:
        """See Checkpoint."""
        return self.rows(name, torch.arange(first, last))

    def check(self, name: str) -> None:
        """UserError where the source's tensor holds NaN or infinite values."""
        self.source.check(name)

    def fingerprint(self) -> str:
        """The source's."""
        return self.source.fingerprint()
