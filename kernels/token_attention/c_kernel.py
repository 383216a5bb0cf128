"""Calls token_attention.c, which is compiled at first use."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hasten.kernels.compiled import load_library

SOURCE = Path(__file__).with_name("token_attention.c")
MAX_SIZE = 256
# Of the widest vectors, in floats.
_LANES = 16


def is_available(size: int) -> bool:
    """Whether there is a kernel for heads of this size on this machine."""
    return size % _LANES == 0 and size <= MAX_SIZE and _function() is not None


def token_attention(
    qkv: Tensor, turns: Tensor, cache: Tensor, position: int, first: int, scale: float, cap: float | None
) -> Tensor:
    """Output (H * G * D,) of one token; see hasten.kernels.token_attention.token_attention."""
    function = _function()
    assert function is not None
    doubled, capacity, size = cache.shape
    kv_heads = doubled // 2
    heads = qkv.numel() // size - doubled
    out = torch.empty(heads * size)
    scores = torch.empty(heads * (-(-(position + 1 - first) // _LANES) * _LANES))
    function(
        qkv.data_ptr(),
        turns.data_ptr(),
        cache.data_ptr(),
        out.data_ptr(),
        scores.data_ptr(),
        heads,
        kv_heads,
        size,
        capacity,
        first,
        position,
        scale,
        0.0 if cap is None else cap,
        torch.get_num_threads(),
    )
    return out


@cache
def _function() -> Callable[..., None] | None:
    library = load_library(SOURCE)
    if library is None:
        return None
    function = library.token_attention
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 6 + [ctypes.c_float] * 2 + [ctypes.c_int]
    function.restype = None
    return function
