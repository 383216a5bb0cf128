"""Calls nearest_plane.c, which is compiled at first use."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hasten.kernels.compiled import load_library
from hasten.kernels.grid_rounding.c_kernel import kind_of

if TYPE_CHECKING:
    from hasten.kernels.nearest_plane import Plane

SOURCE = Path(__file__).with_name("nearest_plane.c")
# What values are rounded to.
DTYPES = (torch.float32, torch.bfloat16)


def is_available() -> bool:
    """Whether the kernel can be compiled on this machine."""
    return _library() is not None


def visit(plane: "Plane", first: int, last: int) -> None:
    """See hasten.kernels.nearest_plane.visit; the kernel must be available, and dtype one of DTYPES."""
    library = _library()
    assert library is not None
    # The columns are rows of larger tensors, of which none is copied but the smallest.
    read = plane.target, plane.lower.contiguous(), plane.scales, plane.zeros, plane.groups
    written = plane.carried, plane.codes, plane.residual, plane.error
    assert all(tensor.is_contiguous() for tensor in (*read, *written))
    rows, pitch = plane.target.shape[1], len(plane.target)
    failed = library.nearest_plane(
        *(tensor.data_ptr() for tensor in (*read, *written)),
        rows,
        pitch,
        first,
        last,
        kind_of(plane.points),
        plane.points.top,
        plane.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {last} columns of {rows} rows")


@cache
def _library() -> ctypes.CDLL | None:
    # Codes of bytes and numbers of 16 bits are taken from words.
    library = load_library(SOURCE) if sys.byteorder == "little" else None
    if library is None:
        return None
    pointer, long, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.nearest_plane.argtypes = [*[pointer] * 9, long, long, long, long, flag, ctypes.c_float, flag, flag]
    library.nearest_plane.restype = ctypes.c_int
    return library
