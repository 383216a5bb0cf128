"""Tensors in a GGUF file under the names and in the layout of transformers, dequantized while they are read."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hasten.accel.models.ggml.types import NUMBERS

F32, F16, BF16 = 0, 1, 30
_PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16, 28: torch.float64}


@dataclass(frozen=True)
class GgufTensor:
    """Place of a tensor; see models.shards.Stored, whose methods it has.

    kind: ggml's type. row_bytes: bytes of the last dimension. heads: rows of a matrix (or elements of a bias) are
    those of so many heads, in llama.cpp's order; 0 where the order is transformers'. less: is subtracted.
    """

    file: Path
    kind: int
    shape: tuple[int, ...]
    begin: int
    row_bytes: int
    heads: int = 0
    less: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is read. Blocks become float16, which has the digits that 8 bits with a float16 scale need."""
        return _PLAIN.get(self.kind, torch.float16)

    @property
    def is_quantized(self) -> bool:
        """Whether the tensor is stored in blocks."""
        return self.kind not in _PLAIN

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape[:-1]) * self.row_bytes

    def part(self, matrix: int, first: int, last: int) -> "GgufTensor":
        """Rows first to last (exclusive) of one matrix of a three-dimensional tensor."""
        _, rows, columns = self.shape
        begin = self.begin + (matrix * rows + first) * self.row_bytes
        return replace(self, shape=(last - first, columns), begin=begin)

    def read(self) -> Tensor:
        """The tensor, in new memory."""
        values = self._values(self.strip(0, self.nbytes)).view(self.shape)
        if self.heads:
            values = _from_pairs(values, self.heads)
        return values.sub_(self.less) if self.less else values

    def read_rows(self, runs: list[tuple[int, int]]) -> Tensor:
        """Rows of a matrix, concatenated. runs: (first row, number of rows) of each run of consecutive rows."""
        if self.heads:
            return torch.cat([self.read()[first : first + count] for first, count in runs])
        data = b"".join(self.strip(first * self.row_bytes, count * self.row_bytes) for first, count in runs)
        return self._values(data).view(-1, self.shape[1])

    def strip(self, offset: int, size: int) -> bytes:
        """Bytes of the tensor from offset on, size of them or as many as there are."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.begin + offset)
            left, parts = min(size, self.nbytes - offset), []
            while left:
                # One call reads 2 GiB at most.
                parts.append(file.read(left))
                left -= len(parts[-1])
            return b"".join(parts)

    def _values(self, data: bytes) -> Tensor:
        if not data:
            return torch.empty(0, dtype=self.dtype)
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if not self.is_quantized:
            return raw.view(self.dtype)
        stored = raw.view(-1, self.row_bytes)
        if self.kind in NUMBERS:
            return NUMBERS[self.kind].dequantize(stored).to(self.dtype)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(stored.numpy(), GGMLQuantizationType(self.kind))).to(self.dtype)


def to_pairs(values: Tensor, heads: int) -> Tensor:
    """Rows (R, …) of these heads in llama.cpp's order: it rotates neighbours, transformers the halves of a head."""
    return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _from_pairs(values: Tensor, heads: int) -> Tensor:
    return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
