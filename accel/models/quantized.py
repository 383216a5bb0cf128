"""Tensors that a checkpoint stores quantized: places like those of plain tensors, which dequantize while they are read.

How they are stored is a module for each `quant_method`, see models/sources.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.accel.activations.hadamard import InputHadamard
from hasten.accel.activations.scales import AttentionScheme
from hasten.accel.activations.scheme import InputScheme
from hasten.accel.errors import UserError
from hasten.accel.models.shards import Place, Stored

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

# Bytes of a matrix that are checked for values that are not finite at a time.
CHECKED_BYTES = 16 << 20
# Scales of inputs, outputs and caches: they belong to the kernels of a server, not to the weights.
_OF_ACTIVATIONS = (
    "activation_scale",
    *(f"{of}_{what}" for of in ("input", "output") for what in ("scale", "zero_point", "global_scale")),
    *(f"{of}_{what}" for of in ("q", "k", "v") for what in ("scale", "zero_point")),
)


class QuantizedTensor(ABC):
    """Place of a tensor that is stored quantized, with the interface of shards.Stored.

    name: its name in the files. parts: what is stored of it, by what follows the name of its module.
    """

    def __init__(self, name: str, parts: Mapping[str, Stored]) -> None:
        self.name, self.parts = name, dict(parts)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized tensor."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the dequantized tensor."""

    @property
    @abstractmethod
    def arguments(self) -> "QuantizationArgs":
        """How it is quantized, in the words of compressed-tensors."""

    @abstractmethod
    def read(self) -> Tensor:
        """The dequantized tensor, in new memory."""

    @property
    def file(self) -> Path:
        """File of its first part."""
        return next(iter(self.parts.values())).file

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def has_rows(self) -> bool:
        """Whether rows can be read alone."""
        return False

    def read_rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """Rows of a matrix, concatenated. runs: first row and number of rows of each run of consecutive rows."""
        whole = self.read()
        return torch.cat([whole[first : first + count] for first, count in runs])

    def part(self, matrix: int, first: int, last: int) -> Place:
        """Rows first to last (exclusive) of one matrix of a three-dimensional tensor."""
        raise UserError(f"tensor {self.name} in {self.file} is quantized as a whole: its matrices cannot be read alone")

    def columns(self, matrix: int, first: int, last: int, step: int = 1) -> Place:
        """Columns first, first + step, … before `last` of one matrix of a three-dimensional tensor, as rows."""
        raise UserError(f"tensor {self.name} in {self.file} is quantized as a whole: its matrices cannot be read alone")

    @abstractmethod
    def check(self, check_finite: Callable[[Tensor, str], None]) -> None:
        """Call check_finite(tensor, name) on what decides whether all values are finite; integers always are."""


class Quantization(ABC):
    """The quantization_config of a checkpoint.

    where: the file that it was read from, for error messages. dtype: that of the model, in which weights are
    dequantized whose scales say nothing of it.
    """

    def __init__(self, config: Mapping[str, Any], where: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.config, self.where, self.dtype = config, where, dtype

    @abstractmethod
    def tensors(self, stored: Mapping[str, Stored]) -> tuple[dict[str, QuantizedTensor], set[str]]:
        """Quantized tensors by their names, and all stored names that belong to them.

        UserError where a part of one is missing.
        """

    @property
    @abstractmethod
    def title(self) -> str:
        """How the weights are quantized, in a few words for logs and reports."""

    def inputs(self, module: str) -> InputScheme | None:
        """How servers round the inputs of a module; None where they do not."""
        return None

    def attention(self, classes: Collection[str]) -> AttentionScheme | None:
        """How they round keys and values, and queries, in attentions of these classes; None where they do not."""
        return None

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of some modules, or states of attentions, are rounded."""
        return False

    def input_rotation(self, module: str, columns: int) -> InputHadamard | None:
        """How the inputs of a module are rotated, of so many channels; None where they are not."""
        return None


def check_rows(place: Stored, check_finite: Callable[[Tensor, str], None], name: str) -> None:
    """Call check_finite(rows, name) on all rows of a stored matrix, a few at a time."""
    rows, columns = place.shape
    step = max(1, CHECKED_BYTES // max(1, columns * place.dtype.itemsize))
    for first in range(0, rows, step):
        check_finite(place.read_rows([(first, min(step, rows - first))]), name)


def belongs_to_activations(name: str) -> bool:
    """Whether a stored tensor is a scale or zero point of activations or of a cache."""
    return name.rpartition(".")[2] in _OF_ACTIVATIONS
