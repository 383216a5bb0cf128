"""Calls second_moment.c, which is compiled at first use."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hasten.kernels.compiled import load_library

SOURCE = Path(__file__).with_name("second_moment.c")
# What the compiled kernel is faster in than torch, see second_moment_abilities() in the source.
_FLOAT32, _BFLOAT16 = 1, 2


def is_faster(dtype: torch.dtype) -> bool:
    """Whether the kernel can be compiled here, and is faster than torch's products for inputs of this type."""
    library = _library()
    if library is None:
        return False
    abilities = int(library.second_moment_abilities())
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        # torch multiplies these on the matrix units.
        return False
    return bool(abilities & (_BFLOAT16 | _FLOAT32 if dtype == torch.bfloat16 else _FLOAT32))


def add(sums: Tensor, x: Tensor, width: int) -> None:
    """See hasten.kernels.second_moment.add. The kernel must be available."""
    library = _library()
    assert library is not None
    keeps = x.dtype == torch.bfloat16 and library.second_moment_abilities() & _BFLOAT16
    x = x.contiguous() if keeps else x.float().contiguous()
    tokens, columns = x.shape
    function = library.second_moment_bfloat16 if keeps else library.second_moment_float32
    if function(x.data_ptr(), tokens, columns, width, sums.data_ptr(), torch.get_num_threads()):
        raise MemoryError(f"no memory for {columns} columns of inputs")


def is_available() -> bool:
    """Whether the kernel can be compiled on this machine."""
    return _library() is not None


def spread(panel: Tensor, start: int, place: Tensor, tokens: int, out: Tensor) -> None:
    """See hasten.kernels.second_moment.spread. The kernel must be available."""
    library = _library()
    assert library is not None
    panel, stop = panel.contiguous(), panel.shape[1]
    given = panel.data_ptr(), start, stop, len(out), place.data_ptr(), tokens, out.data_ptr()
    library.second_moment_spread(*given, torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL | None:
    # The kernel reads two bfloat16 values as one 32-bit word.
    library = load_library(SOURCE) if sys.byteorder == "little" else None
    if library is None:
        return None
    library.second_moment_abilities.restype = ctypes.c_int
    for function in (library.second_moment_float32, library.second_moment_bfloat16):
        function.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 3, ctypes.c_void_p, ctypes.c_int]
        function.restype = ctypes.c_int
    pointer, long = ctypes.c_void_p, ctypes.c_long
    library.second_moment_spread.argtypes = [pointer, *[long] * 3, pointer, ctypes.c_float, pointer, ctypes.c_int]
    library.second_moment_spread.restype = None
    return library
