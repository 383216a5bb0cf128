"""Writes a GGUF file tensor by tensor: first the header with all places, then the data, piece by piece."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ALIGNMENT = 32


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the file. shape: as in torch. kind: ggml's type. pieces: makes its bytes, in order."""

    name: str
    shape: tuple[int, ...]
    kind: int
    pieces: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        columns, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        return int(np.prod(self.shape, dtype=np.int64)) // columns * size


def write_gguf(
    path: Path, architecture: str, describe: Iterable[Callable[["GGUFWriter"], None]], tensors: Sequence[OutputTensor]
) -> None:
    """Write a file. describe: functions that add metadata to the package's writer, in order."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    for add in describe:
        add(writer)
    for tensor in tensors:
        # For values of this dtype the package takes the shape as it is.
        kind = GGMLQuantizationType(tensor.kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                file.write(piece)
                written += len(piece)
            assert written == tensor.nbytes, f"{tensor.name} has {written} bytes, {tensor.nbytes} were announced"
            file.write(bytes(-written % _ALIGNMENT))
