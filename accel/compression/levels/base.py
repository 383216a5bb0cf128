"""What a kind of level must be able to do: a level is one way to store a linear layer.

A kind is one module in `levels/kinds`, which levels.level.level_kinds finds. It owns the level's name, exact size,
packed form, and how a method makes it. Nothing else in the code names a kind, but for the job options that are
shorthand for one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self

import torch
from torch import Tensor

from hasten.accel.compression.calibration.slabs import row_slabs, slab_of
from hasten.accel.compression.method import Method
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Layer


@dataclass(frozen=True)
class StoredTensor:
    """Name, behind the layer's or the level's, dtype and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


# The shape of the dense weight, which every packed form has; it is not counted in stored_bits.
SHAPE = StoredTensor("weight_shape", torch.int64, (2,))


class Level(ABC):
    """One way to store a linear layer; subclasses are frozen dataclasses, equal where their names are equal.

    examples: names of the kind, for error messages and for the tests that every kind must pass. family: the kind of
    method that makes these levels. is_loaded_packed: whether a checkpoint holds just what a level database does.
    """

    examples: ClassVar[tuple[str, ...]]
    family: ClassVar[type]
    is_loaded_packed: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> Self | None:
        """Level of this kind with this name, None where it is no name of this kind; UserError names a bad value."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in databases, reports and options; `parse` gives the level back."""

    # The size

    @abstractmethod
    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Exact size of a layer (R, C) whose values and scales have itemsize bytes; padding is not counted."""

    @abstractmethod
    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """What `pack` returns for a layer (R, C) of that dtype, known before it is solved."""

    def check(self, layer: str, columns: int) -> None:
        """UserError where a layer of so many input columns cannot have this level."""
        return None

    def of_expert(self) -> "Level":
        """The level as an expert of a mixture gets it."""
        return self

    def options(self) -> dict[str, int | float | str | bool]:
        """The level by the names of job options, for the fingerprint of a run."""
        return {"level": self.name}

    # The stored form

    @abstractmethod
    def pack(self, weight: CompressedWeight) -> dict[str, Tensor]:
        """Tensors on the CPU that a level database stores of a layer, by name."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Dense weight (R, C), in the checkpoint's dtype, of what `pack` returned."""

    @property
    def loader_scheme(self) -> Scheme | None:
        """Grid of the codes that transformers and vLLM load, None where the layer is dense in a checkpoint."""
        return None

    def checkpoint_tensors(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the layer in a checkpoint, by what follows the layer's name, of what `pack` returned.

        Dense, unless loaders read codes of this kind: those of loader_scheme then, as the format pack-quantized.
        """
        return {"weight": self.unpack(stored).contiguous()}

    @abstractmethod
    def facts(self, weight: CompressedWeight) -> dict[str, object]:
        """What a report says about a layer at this level beside its size and error, such as `bits`."""

    # The method

    def method_of(self, given: Iterable[Method]) -> Method:
        """The first of the given methods that can make this level, or the kind's own default."""
        return next((method for method in given if isinstance(method, self.family)), None) or self.default_method()

    def default_method(self) -> Method:
        """Method where none of the family was given; UserError where the kind has no default."""
        raise UserError(f"level {self.name} needs a method of the kind {self.family.__name__}, and none was given")

    def check_method(self, method: Method) -> None:
        """UserError where a method of the family cannot make this level."""
        return None

    @abstractmethod
    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """What stands in for a method where too few tokens reached an expert, and what it does, for the note."""

    @abstractmethod
    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Compress rows of layers, weight (R, C), by a method of the family; prepared comes from its prepare()."""

    def solve(
        self, method: Method, layers: Sequence[Layer], read: Callable[[Layer], Tensor], prepared: object, device: str
    ) -> dict[str, Result[CompressedWeight]]:
        """Compress layers that share an input, by name. read: weight (R, C) of a layer.

        No row depends on another, so layers are stacked and cut into slabs by rows. Kinds that choose something for a
        whole layer override this.
        """
        parts: dict[str, list[Result[CompressedWeight]]] = {layer.name: [] for layer in layers}
        for slab in row_slabs([(layer.name, layer.rows, layer.columns) for layer in layers], slab_of(device)):
            by_name = {layer.name: layer for layer in layers}
            weights = [read(by_name[name])[rows] for name, rows in slab]
            result = self.make(method, torch.cat(weights).to(device), prepared)
            start = 0
            for (name, _), weight in zip(slab, weights, strict=True):
                parts[name].append(result.rows(start, start + len(weight)))
                start += len(weight)
        return {name: Result.join(results) for name, results in parts.items()}
