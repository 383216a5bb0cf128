"""The header of a GGUF file: metadata and the places of the tensors, read without a memory map.

Source: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.
"""

import struct
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_ALIGNMENT = 32
# Value types by number: formats of numbers, then strings and arrays.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file. shape: as in torch. kind: ggml's type. begin: its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Metadata by key, tensors by GGUF's names, and the bytes of the header."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    raw: bytes

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.metadata.get("general.architecture"))

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """Value of a key of the architecture, such as `attention.head_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_header(path: Path) -> Header:
    """Header of a file; UserError where it is truncated or no GGUF file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise UserError(f"{path} is not a GGUF file")
        try:
            version, tensors, entries = struct.unpack("<IQQ", _take(file, 20))
            if version not in _VERSIONS:
                raise UserError(f"{path} is GGUF version {version}: readable are versions 2 and 3")
            metadata = {}
            for _ in range(entries):
                key = _string(file)
                metadata[key] = _value(file, _number(file, "I"))
            places = [_entry(file) for _ in range(tensors)]
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError):
            raise UserError(f"{path} is truncated or damaged: its header cannot be read") from None
        alignment = int(metadata.get("general.alignment", _ALIGNMENT))
        end = file.tell()
        file.seek(0)
        raw = file.read(end)
    start = -(-end // alignment) * alignment
    found = {}
    for name, shape, kind, offset in places:
        entry = TensorEntry(shape, kind, start + offset, _nbytes(path, name, shape, kind))
        if entry.begin + entry.nbytes > size:
            raise UserError(f"{path} is truncated: tensor {name} ends behind the end of the file")
        found[name] = entry
    return Header(metadata, found, raw)


def _nbytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        columns, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise UserError(
            f"tensor {name} in {path} has ggml's type {kind}, which the package gguf does not know"
        ) from None
    return prod(shape) // columns * size


def _take(file: BufferedReader, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise struct.error("truncated")
    return data


def _number(file: BufferedReader, form: str) -> Any:
    return struct.unpack(f"<{form}", _take(file, struct.calcsize(f"<{form}")))[0]


def _string(file: BufferedReader) -> str:
    return _take(file, _number(file, "Q")).decode()


def _value(file: BufferedReader, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _number(file, _NUMBERS[kind])
    of, count = _number(file, "I"), _number(file, "Q")
    if of in _NUMBERS:
        form = f"<{count}{_NUMBERS[of]}"
        return list(struct.unpack(form, _take(file, struct.calcsize(form))))
    return [_value(file, of) for _ in range(count)]


def _entry(file: BufferedReader) -> tuple[str, tuple[int, ...], int, int]:
    name = _string(file)
    shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
    # ggml counts the fastest dimension first.
    return name, shape[::-1], _number(file, "I"), _number(file, "Q")
