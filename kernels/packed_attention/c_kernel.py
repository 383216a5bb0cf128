"""Calls packed_attention.c, which is compiled at first use."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hasten.kernels.attention.contract import Partial
from hasten.kernels.compiled import load_library
from hasten.kernels.quantize_pack import Packed

SOURCE = Path(__file__).with_name("packed_attention.c")
MAX_SIZE = 256
# Codes that do not cross bytes.
_BITS = (2, 4, 8)
# Of the widest vectors, in floats.
_LANES = 16


def is_available(bits: int, size: int) -> bool:
    """Whether there is a kernel for these bits and heads of this size on this machine."""
    # A part of the values with a scale of its own, at most 64 numbers, is whole vectors in each phase.
    part = min(size, 64)
    whole = size % part == 0 and part * bits // 8 % _LANES == 0
    return bits in _BITS and whole and size <= MAX_SIZE and _function() is not None


def packed_attention(queries: Tensor, keys: Packed, values: Packed, scale: float, cap: float | None) -> Partial:
    """See hasten.kernels.packed_attention.packed_attention."""
    function = _function()
    assert function is not None
    assert keys.offset is not None
    assert values.offset is not None
    heads, rows, size = queries.shape
    tokens = len(keys.words)
    assert keys.words.is_contiguous()
    assert values.words.is_contiguous()
    queries = queries.contiguous()
    grids = (keys.scale, keys.offset, values.scale, values.offset)
    assert all(part.dtype == torch.float16 and part.is_contiguous() for part in grids)
    room = -(-tokens // _LANES) * _LANES
    o, scores = torch.empty(heads, rows, size), torch.empty(heads, rows, room)
    m, total = torch.empty(heads, rows), torch.empty(heads, rows)
    function(
        queries.data_ptr(),
        keys.words.data_ptr(),
        *(part.data_ptr() for part in grids[:2]),
        values.words.data_ptr(),
        *(part.data_ptr() for part in grids[2:]),
        *(part.data_ptr() for part in (o, m, total, scores)),
        rows,
        tokens,
        room,
        heads,
        size,
        keys.group_size,
        values.group_size,
        keys.bits,
        scale,
        cap or 0.0,
        torch.get_num_threads(),
    )
    return Partial(o, m, total)


@cache
def _function() -> Callable[..., None] | None:
    library = load_library(SOURCE)
    if library is None:
        return None
    function: Callable[..., None] = library.packed_attention
    pointers, longs = [ctypes.c_void_p] * 11, [ctypes.c_long] * 7
    library.packed_attention.argtypes = [*pointers, *longs, ctypes.c_int, ctypes.c_float, ctypes.c_float, ctypes.c_int]
    library.packed_attention.restype = None
    return function
