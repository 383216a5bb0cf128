"""Calls packed_gemm.c, which is compiled at first use."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.compiled import load_library
from hasten.kernels.packed_gemm.panels import CHUNK, PANEL, Panels

SOURCE = Path(__file__).with_name("packed_gemm.c")


class _Function(Protocol):
    """Signature of the C function; pointers are addresses."""

    def __call__(
        self,
        x: int,
        codes: int,
        scale: int,
        zero: int | None,
        out: int,
        scratch: int | None,
        x_sums: int | None,
        rows: int,
        inputs: int,
        outputs: int,
        group: int,
        bits: int,
        wide: bool,
        threads: int,
    ) -> None:
        """Write the product to out. scratch, x_sums: room, see the C source. wide: whether scales are float32."""


def is_available() -> bool:
    """Whether the kernel can be compiled on this machine."""
    return _function() is not None


def packed_gemm(x: Tensor, weight: Panels) -> Tensor:
    """Product (N, R) float32 of rows x (N, C) float32; the kernel must be available.

    The product's row stride may exceed R, because R is padded to whole panels.
    """
    function = _function()
    assert function is not None
    group = weight.padded_group
    if weight.columns is not None:
        x = x[:, weight.columns]
    if group != weight.group:
        x = F.pad(x.unflatten(1, (-1, weight.group)), (0, group - weight.group)).flatten(1)
    x = x.contiguous()
    rows, inputs = x.shape
    outputs, padded = weight.shape[0], weight.codes.shape[0] * PANEL
    out = torch.empty(rows, padded)
    scratch = None if rows == 1 else torch.empty_like(x)
    x_sums = None if weight.zero_point is None else torch.empty(rows, inputs // group * -(-group // CHUNK))
    function(
        x.data_ptr(),
        *weight.addresses,
        out.data_ptr(),
        None if scratch is None else scratch.data_ptr(),
        None if x_sums is None else x_sums.data_ptr(),
        rows,
        inputs,
        padded,
        group,
        weight.bits,
        weight.scale.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return out if padded == outputs else out[:, :outputs]


@cache
def _function() -> _Function | None:
    # The kernel reads codes of 32-bit words.
    library = load_library(SOURCE) if sys.byteorder == "little" else None
    if library is None:
        return None
    function = library.packed_gemm
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_long] * 4 + [ctypes.c_int] * 3
    function.restype = None
    return cast(_Function, function)
