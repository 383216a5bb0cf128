"""Calls skinny_gemm.c, which is compiled at first use."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from hasten.kernels.compiled import load_library
from hasten.kernels.skinny_gemm.reference import PANEL

SOURCE = Path(__file__).with_name("skinny_gemm.c")


class _Function(Protocol):
    """Signature of the C function; pointers are addresses."""

    def __call__(
        self, x: int, packed: int, out: int, scratch: int | None, rows: int, inputs: int, outputs: int, threads: int
    ) -> None:
        """Write the product to out. scratch: room for a copy of x; None with one row."""


def is_available() -> bool:
    """Whether the kernel can be compiled on this machine."""
    return _function() is not None


def skinny_gemm(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """Product (N, R) float32; see hasten.kernels.skinny_gemm.skinny_gemm. The kernel must be available."""
    function = _function()
    assert function is not None
    x = x.contiguous()
    rows, inputs = x.shape
    padded = packed.shape[0] * PANEL
    out = torch.empty(rows, padded)
    scratch = None if rows == 1 else torch.empty_like(x)
    function(
        x.data_ptr(),
        packed.data_ptr(),
        out.data_ptr(),
        None if scratch is None else scratch.data_ptr(),
        rows,
        inputs,
        padded,
        torch.get_num_threads(),
    )
    return out if padded == outputs else out[:, :outputs]


@cache
def _function() -> _Function | None:
    # The kernel reads two bfloat16 values as one 32-bit word.
    library = load_library(SOURCE) if sys.byteorder == "little" else None
    if library is None:
        return None
    function = library.skinny_gemm
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3 + [ctypes.c_int]
    function.restype = None
    return cast(_Function, function)
