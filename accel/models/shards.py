"""safetensors files, read without memory maps: headers, and byte ranges straight into a tensor's memory.

Pages of a mapped file count in the process's memory; files that are read with plain calls do not.
"""

import json
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hasten.accel.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8  # a file begins with the length of its header, a little-endian integer of this many bytes


class Place(Protocol):
    """Where a tensor is read from."""

    @property
    def file(self) -> Path:
        """File that holds it, for error messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor that `read` returns."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    def read(self) -> Tensor:
        """The tensor, in new memory."""

    def read_rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """Rows of a matrix, concatenated. runs: (first row, number of rows) of each run of consecutive rows."""


@dataclass(frozen=True)
class Stored:
    """Place of a stored tensor. begin: its first byte, counted from the start of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * self.dtype.itemsize

    def part(self, matrix: int, first: int, last: int) -> "Stored":
        """Rows first to last (exclusive) of one matrix of a three-dimensional tensor."""
        _, rows, columns = self.shape
        skipped = (matrix * rows + first) * columns * self.dtype.itemsize
        return Stored(self.file, self.dtype, (last - first, columns), self.begin + skipped)

    def columns(self, matrix: int, first: int, last: int, step: int = 1) -> "StoredColumns":
        """Columns first, first + step, … before `last` of one matrix of a three-dimensional tensor, as rows."""
        return StoredColumns(self.part(matrix, 0, self.shape[1]), first, last, step)

    def read(self) -> Tensor:
        """The tensor, in new memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.numel():
            with self.file.open("rb", buffering=0) as file:
                _fill(file, self.begin, tensor)
        return tensor

    def read_rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """Rows of a matrix, concatenated. runs: (first row, number of rows) of each run of consecutive rows."""
        columns = self.shape[1]
        tensor = torch.empty(sum(count for _, count in runs), columns, dtype=self.dtype)
        done = 0
        with self.file.open("rb", buffering=0) as file:
            for first, count in runs:
                if count and columns:
                    begin = self.begin + first * columns * self.dtype.itemsize
                    _fill(file, begin, tensor[done : done + count])
                done += count
        return tensor

    def strip(self, offset: int, size: int) -> bytes:
        """Bytes of the tensor from offset on, size of them or as many as there are."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.begin + offset)
            return file.read(min(size, self.nbytes - offset))


@dataclass(frozen=True)
class StoredPart(ABC):
    """Entries first, first + step, … before `last` of one dimension of a stored matrix, or stack of matrices."""

    matrix: Stored
    first: int
    last: int
    step: int = 1

    @property
    def file(self) -> Path:
        """See Place."""
        return self.matrix.file

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """See Place."""

    @property
    def dtype(self) -> torch.dtype:
        """See Place."""
        return self.matrix.dtype

    @property
    def nbytes(self) -> int:
        """See Place."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def entries(self) -> slice:
        """The entries."""
        return slice(self.first, self.last, self.step)

    @abstractmethod
    def read(self) -> Tensor:
        """See Place."""

    def read_rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """See Place; other rows are read, too."""
        whole = self.read()
        return torch.cat([whole[first : first + count] for first, count in runs])


class StoredColumns(StoredPart):
    """Columns of a matrix, as rows: experts that are stored transposed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See Place."""
        return len(range(self.first, self.last, self.step)), self.matrix.shape[0]

    def read(self) -> Tensor:
        """See Place."""
        return self.matrix.read()[:, self.entries].T.contiguous()


def _fill(file: FileIO, begin: int, tensor: Tensor) -> None:
    view = tensor.view(-1).view(torch.uint8).numpy().data
    file.seek(begin)
    while view:
        # One call reads 2 GiB at most.
        count = file.readinto(view)
        if not count:
            raise UserError(f"shard {file.name} is truncated: it ends before byte {begin + len(view)}")
        view = view[count:]


def read_header(path: Path) -> tuple[bytes, dict[str, Stored]]:
    """Raw header of a file, and the places of its tensors by name.

    UserError where the file is missing, truncated, or not a safetensors file.
    """
    if not path.is_file():
        raise UserError(f"shard {path} is missing: the checkpoint needs every file that its index names")
    size = path.stat().st_size
    with path.open("rb") as file:
        opening = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", opening)[0] if len(opening) == _LENGTH_BYTES else 0
        if len(opening) < _LENGTH_BYTES or (opening[:1] and _LENGTH_BYTES + length > size):
            raise UserError(
                f"shard {path} is truncated or not a safetensors file: its {size} bytes end inside the header"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        places = {name: _place(path, name, entry, _LENGTH_BYTES + length, size) for name, entry in entries.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"shard {path} is not a safetensors file: its header cannot be read") from None
    return raw, places


def _place(path: Path, name: str, entry: dict, origin: int, size: int) -> Stored:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise UserError(f"tensor {name} in {path} has dtype {entry['dtype']}: readable are {', '.join(DTYPES)}")
    stored = Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), origin + begin)
    if end - begin != stored.nbytes:
        raise UserError(f"tensor {name} in {path} has {end - begin} bytes: its shape and dtype need {stored.nbytes}")
    if origin + end > size:
        raise UserError(f"shard {path} is truncated: tensor {name} ends at byte {origin + end}, the file at {size}")
    return stored
