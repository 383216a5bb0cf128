"""Calls rms_norm.c, which is compiled at first use."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hasten.kernels.compiled import load_library

SOURCE = Path(__file__).with_name("rms_norm.c")


def is_available() -> bool:
    """Whether the kernel can be compiled on this machine."""
    return _function() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised x (…, D) float32; the weight is contiguous. See hasten.kernels.rms_norm.rms_norm."""
    function = _function()
    assert function is not None
    x = x.contiguous()
    out = torch.empty_like(x)
    size = weight.shape[0]
    function(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
    return out


@cache
def _function() -> Callable[..., None] | None:
    library = load_library(SOURCE)
    if library is None:
        return None
    function = library.rms_norm
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2 + [ctypes.c_float]
    function.restype = None
    return function
