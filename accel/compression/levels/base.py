"""Base class of levels; a level is one way to store a linear layer.

A kind of level is one module in `levels/kinds`, discovered by levels.level.level_kinds. It defines the level's name,
exact size and packed form, and how a method makes it. No other code names a kind, except for job options that are
shorthand for one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hasten.accel.activations.scheme import InputScheme
from hasten.accel.compression.calibration.slabs import row_slabs, slab_of
from hasten.accel.compression.formats.base import LoaderScheme, StoredTensor
from hasten.accel.compression.method import Method
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Layer
from hasten.accel.models.ggml.base import BlockType


@dataclass(frozen=True)
class AutoSize:
    """What a group size of `auto` stands for in a layer. own: of its own columns. shared: of those of all layers."""

    own: int = -1
    shared: int = -1


class Level(ABC):
    """One way to store a linear layer. Subclasses are frozen dataclasses; levels of equal name are equal.

    examples: names of the kind, for error messages and for the tests that every kind must pass. family: base class of
    the methods that make these levels. is_loaded_packed: whether checkpoints store these levels in the packed form.
    """

    examples: ClassVar[tuple[str, ...]]
    family: ClassVar[type]
    is_loaded_packed: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> Self | None:
        """Level of this kind with this name; None where the name is not of this kind; UserError for a bad value."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in databases, reports and options; `parse` returns the level of a name."""

    # The size

    @abstractmethod
    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Exact size of a layer (R, C) whose values and scales have itemsize bytes; without padding."""

    @abstractmethod
    def stored_tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Tensors that `pack` returns for a layer (R, C) of that dtype; known before the layer is solved."""

    def check(self, layer: str, columns: int) -> None:
        """UserError where a layer with this number of input columns cannot have this level."""
        return None

    def of_expert(self) -> "Level":
        """The level that experts get in place of this one."""
        return self

    def of_group_size(self, size: AutoSize) -> "Level":
        """The level with a size in place of the group size `auto`; itself where the size is given, or there is none."""
        return self

    def options(self) -> dict[str, int | float | str | bool]:
        """The level as job options by name, for the fingerprint of a run."""
        return {"level": self.name}

    # The stored form

    @abstractmethod
    def pack(self, weight: CompressedWeight) -> dict[str, Tensor]:
        """Tensors, on the CPU and by name, that a level database stores of a layer."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Dense weight (R, C), in the checkpoint's dtype, from the tensors of `pack`."""

    def dense(self, weight: CompressedWeight) -> Tensor:
        """Dense weight (R, C) of a compressed one, as `unpack` gives it of its packed form."""
        return self.unpack(self.pack(weight))

    @property
    def inputs(self) -> InputScheme | None:
        """How the layer's inputs are rounded before the product; None for not at all."""
        return None

    @property
    def loader_scheme(self) -> LoaderScheme | None:
        """How transformers and vLLM load the codes; None where checkpoints hold the layer dense."""
        return None

    def ggml_type(self, columns: int) -> type[BlockType] | None:
        """llama.cpp's type of a layer with this many columns; None where it has none for this level."""
        return None

    def checkpoint_tensors(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the layer in a checkpoint, by what follows the layer's name, from the tensors of `pack`.

        They are the dense weight, or, where loader_scheme is not None, codes as it says.
        """
        return {"weight": self.unpack(stored).contiguous()}

    @abstractmethod
    def facts(self, weight: CompressedWeight) -> dict[str, object]:
        """A report's entries for a layer at this level besides its size and error, such as `bits`."""

    # The method

    def method_of(self, given: Iterable[Method]) -> Method:
        """The first given method of the level's family, or else the kind's default."""
        return next((method for method in given if isinstance(method, self.family)), None) or self.default_method()

    def default_method(self) -> Method:
        """Method that is used where none of the family is given; UserError where the kind has no default."""
        raise UserError(f"level {self.name} needs a method of the kind {self.family.__name__}, and none was given")

    def check_method(self, method: Method) -> None:
        """UserError where a method of the family cannot make this level."""
        return None

    @abstractmethod
    def without_statistics(self, method: Method) -> tuple[Method, str]:
        """Method for an expert that too few tokens reached, and what it does, for the note in the report."""

    def cost(self, method: Method, layers: LayerStack) -> MethodCost | None:
        """Cost of `prepare` and of the solve for layers of this shape; None where the method does not state it."""
        return None

    @abstractmethod
    def make(self, method: Method, weight: Tensor, prepared: object) -> Result[CompressedWeight]:
        """Compress rows of layers, weight (R, C), by a method of the family. prepared comes from its prepare()."""

    def solve(
        self, method: Method, layers: Sequence[Layer], read: Callable[[Layer], Tensor], prepared: object, device: str
    ) -> dict[str, Result[CompressedWeight]]:
        """Compress layers that share an input; returns results by layer name. read: loads weight (R, C) of a layer.

        Rows do not depend on each other, so layers are stacked and cut into slabs by rows. Kinds that choose something
        for a whole layer override this.
        """
        return solve_rows(lambda weight: self.make(method, weight, prepared), layers, read, device)


def solve_rows(
    make: Callable[[Tensor], Result[CompressedWeight]],
    layers: Sequence[Layer],
    read: Callable[[Layer], Tensor],
    device: str,
    tile: int = 1,
) -> dict[str, Result[CompressedWeight]]:
    """Compress layers that share an input, in slabs of rows; returns results by layer name.

    make: compresses rows (R, C) on the device. tile: rows of a layer, from its first one, that must stay together; with
    1, layers are stacked.
    """
    parts: dict[str, list[Result[CompressedWeight]]] = {layer.name: [] for layer in layers}
    by_name, size = {layer.name: layer for layer in layers}, slab_of(device)
    columns = layers[0].columns
    size = max(tile, size // columns // tile * tile) * columns if tile > 1 else size
    stacks = [layers] if tile == 1 else [[layer] for layer in layers]
    for stack in stacks:
        for slab in row_slabs([(layer.name, layer.rows, layer.columns) for layer in stack], size):
            weights = [read(by_name[name])[rows] for name, rows in slab]
            result = make(torch.cat(weights).to(device))
            start = 0
            for (name, _), weight in zip(slab, weights, strict=True):
                parts[name].append(result.rows(start, start + len(weight)))
                start += len(weight)
    return {name: Result.join(results) for name, results in parts.items()}
