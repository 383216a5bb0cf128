"""Edits of stored tensors: what a transform changes in a block, small enough to be stored beside the output.

A tensor is edited in float32 and rounded once, to its stored dtype, after its last edit. An edit of a weight's columns
implies how the input of the layer changes, so that statistics of the input before the edit can still be used.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from hasten.accel.outputs.resumable import write_whole

# In place of a block's number, for tensors outside the blocks.
OUTSIDE = -1
_NOTE = "edits"
_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """A change of one tensor. Fields are tensors and JSON values; a subclass lives in a module of this package.

    keeps_magnitudes: whether mean_input and peak_input are exact; where they are not, a later transform that needs
    statistics gets new ones.
    """

    keeps_magnitudes: ClassVar[bool] = True

    @abstractmethod
    def apply(self, tensor: Tensor) -> Tensor:
        """The edited tensor, float32, of the whole tensor in float32, which may be overwritten."""

    def apply_to_rows(self, rows: Tensor, numbers: Tensor) -> Tensor | None:
        """The edited rows (N, C) float32 of a matrix; None where an edited row depends on other rows.

        numbers: (N,), of the rows.
        """
        return None

    def before(self, weight: Tensor) -> Tensor:
        """Weight (R, C) for the input before the edit, that has the output of `weight` for the input after it.

        For errors of an edited weight, which are measured on statistics of the input before the edit.
        """
        return weight

    def mean_input(self, mean: Tensor) -> Tensor:
        """Mean magnitudes (C,) of the inputs after the edit, for those before it."""
        return mean

    def peak_input(self, peak: Tensor) -> Tensor:
        """Largest magnitudes (C,) of the inputs after the edit, for those before it."""
        return peak


@dataclass(frozen=True, eq=False)
class ScaleColumns(Edit):
    """Multiplies each column of a matrix, whose input is divided alike. scale: (C,) float32, positive."""

    scale: Tensor

    def apply(self, tensor: Tensor) -> Tensor:
        """See Edit."""
        return tensor * self.scale.to(tensor.device)

    def apply_to_rows(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """See Edit."""
        return self.apply(rows)

    def before(self, weight: Tensor) -> Tensor:
        """See Edit."""
        return weight / self.scale.to(weight.device)

    def mean_input(self, mean: Tensor) -> Tensor:
        """See Edit."""
        return mean / self.scale.to(mean.device)

    def peak_input(self, peak: Tensor) -> Tensor:
        """See Edit."""
        return peak / self.scale.to(peak.device)


@dataclass(frozen=True, eq=False)
class ScaleRows(Edit):
    """Multiplies rows of a matrix, or entries of a vector. scale: (N,) float32. first: the first row."""

    scale: Tensor
    first: int = 0

    def apply(self, tensor: Tensor) -> Tensor:
        """See Edit."""
        return self._scaled(tensor, torch.arange(len(tensor)))

    def apply_to_rows(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """See Edit."""
        return self._scaled(rows, numbers)

    def _scaled(self, tensor: Tensor, numbers: Tensor) -> Tensor:
        place = numbers.cpu() - self.first
        inside = (place >= 0) & (place < len(self.scale))
        factor = torch.where(inside, self.scale[place.clamp(0, len(self.scale) - 1)], 1.0).to(tensor.device)
        return tensor * factor.reshape(-1, *([1] * (tensor.ndim - 1)))


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Replaces a tensor, such as the weight of a norm. value: in any dtype."""

    value: Tensor

    def apply(self, tensor: Tensor) -> Tensor:
        """See Edit."""
        return self.value.to(tensor.device, torch.float32)

    def apply_to_rows(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """See Edit."""
        return self.value[numbers.cpu()].to(rows.device, torch.float32)


# Edits of tensors by logical name, in the order in which they are applied.
Edits = Mapping[str, Sequence[Edit]]


def joined(parts: Sequence[Edits]) -> dict[str, tuple[Edit, ...]]:
    """All edits; those of later parts follow those of earlier ones."""
    together: dict[str, tuple[Edit, ...]] = {}
    for part in parts:
        for name, edits in part.items():
            together[name] = (*together.get(name, ()), *edits)
    return together


def edited(tensor: Tensor, edits: Sequence[Edit]) -> Tensor:
    """The tensor after some edits, in float32; itself, in its dtype, where there are none."""
    for edit in edits:
        tensor = edit.apply(tensor.float())
    return tensor


class EditFolder:
    """Folder with the edits of each block, a file a block, written atomically.

    blocks: numbers of the blocks that have edits once they are written, OUTSIDE among them; others have none. They are
    read strictly: a missing file is an error and is never taken for a block without edits.
    """

    def __init__(self, path: Path, blocks: Collection[int]) -> None:
        self.path = path
        self.blocks: Collection[int] = frozenset(blocks)
        self._read: dict[int, Edits] = {}

    def is_written(self, block: int) -> bool:
        """Whether nothing is left to write for a block."""
        return block not in self.blocks or self._file(block).exists()

    def read(self, block: int) -> Edits:
        """Edits of a block by tensor; empty for blocks without edits."""
        if block not in self.blocks:
            return {}
        if block not in self._read:
            # Blocks are visited in order: a few suffice.
            while len(self._read) >= 4:
                del self._read[next(iter(self._read))]
            self._read[block] = read_edits(self._file(block))
        return self._read[block]

    def write(self, block: int, edits: Edits) -> None:
        """Write the edits of a block."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_edits(self._file(block), edits)

    def _file(self, block: int) -> Path:
        return self.path / ("outside.safetensors" if block == OUTSIDE else f"block-{block:05d}.safetensors")


def write_edits(path: Path, edits: Edits) -> None:
    """Write edits to a file, atomically. An edit of several tensors is stored once."""
    from safetensors.torch import save_file

    numbers: dict[Edit, int] = {}
    listed: list[list[Any]] = []
    tensors: dict[str, Tensor] = {}
    for edit in (edit for name in sorted(edits) for edit in edits[name]):
        if edit in numbers:
            continue
        numbers[edit] = len(listed)
        values = {field.name: getattr(edit, field.name) for field in fields(edit)}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{len(listed)}.{key}"] = value.detach().cpu().clone().contiguous()
        kind = f"{type(edit).__module__.removeprefix(_PACKAGE)}.{type(edit).__qualname__}"
        listed.append([kind, {key: value for key, value in values.items() if not isinstance(value, Tensor)}])
    places = {name: [numbers[edit] for edit in edits[name]] for name in sorted(edits)}
    note = {_NOTE: json.dumps({"edits": listed, "tensors": places})}
    needed = sum(tensor.nbytes for tensor in tensors.values())
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=note), needed)


def read_edits(path: Path) -> Edits:
    """Edits in a file that write_edits wrote."""
    with safe_open(path, framework="pt") as file:
        note = json.loads(file.metadata()[_NOTE])
        tensors: dict[int, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 (no mapping)
            number, _, field = key.partition(".")
            tensors.setdefault(int(number), {})[field] = file.get_tensor(key)
    edits = []
    for number, (kind, plain) in enumerate(note["edits"]):
        module, _, class_name = kind.rpartition(".")
        edit_class = getattr(importlib.import_module(f"{_PACKAGE}{module}"), class_name)
        edits.append(edit_class(**plain, **tensors.get(number, {})))
    return {name: tuple(edits[number] for number in used) for name, used in note["tensors"].items()}
