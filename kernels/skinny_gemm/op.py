"""Products of float32 rows by a weight whose values bfloat16 holds, as those of most checkpoints are.

Decoding reads every weight for a few rows: half the bytes are half the time, and no value changes. The weight lies in
panels of 32 outputs, input by input, as the kernel reads it, and is widened in the registers. Every output is summed in
one order whatever the number of rows or threads, so that a token has the same products in a pass of one and in a tree.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from hasten.kernels.compiled import library
from hasten.kernels.dispatch import use_compiled

PANEL = 32
_SOURCE = Path(__file__).with_name("skinny_gemm.c")


def pack(weight: Tensor) -> Tensor | None:
    """Panels (P, C, 16, 2) bfloat16 of a weight (R, C) float32, R filled up with zeros to 32 * P.

    None where few_rows would not be faster than torch, or bfloat16 does not hold every value.
    """
    if not use_compiled(weight) or _function() is None:
        return None
    short = shortened(weight)
    return None if short is None else panels(short)


def shortened(weight: Tensor) -> Tensor | None:
    """A weight in bfloat16; None where that does not hold every value."""
    short = weight.to(torch.bfloat16)
    return short if torch.equal(short.to(weight.dtype), weight) else None


def panels(weight: Tensor) -> Tensor:
    """A weight (R, C) in the kernel's order, see pack."""
    outputs, inputs = weight.shape
    count = -(-outputs // PANEL)
    found = weight.new_zeros(count * PANEL, inputs)
    found[:outputs] = weight
    return found.view(count, 2, PANEL // 2, inputs).permute(0, 3, 2, 1).contiguous()


def few_rows(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """Product (N, R) of rows (N, C) float32 by a packed weight of so many outputs; rows are R or more apart."""
    function = _function() if use_compiled(x) else None
    return reference(x, packed, outputs) if function is None else _launch(function, x, packed, outputs)


def reference(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """The same in torch."""
    return x @ packed.float().permute(0, 3, 2, 1).flatten(0, 2)[:outputs].T


def _launch(function: Callable[..., None], x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    x = x.contiguous()
    rows, inputs = x.shape
    wide = packed.shape[0] * PANEL
    out = torch.empty(rows, wide)
    function(x.data_ptr(), packed.data_ptr(), out.data_ptr(), rows, inputs, wide, torch.get_num_threads())
    return out if wide == outputs else out[:, :outputs]


@cache
def _function() -> Callable[..., None] | None:
    found = library(_SOURCE) if sys.byteorder == "little" else None
    if found is None:
        return None
    function = found.few_rows
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3 + [ctypes.c_int]
    function.restype = None
    return cast(Callable[..., None], function)
