"""Calls segmented_token.c, which is compiled at first use."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.compiled import load_library
from hasten.kernels.segmented_token.operands import DenseOperands, Operands

SOURCE = Path(__file__).with_name("segmented_token.c")
MAX_SIZE = 256
# Of the widest vectors, in floats.
_LANES = 16


class _Segment(ctypes.Structure):
    """See `segment` in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "lengths", "bias")),
        *((name, ctypes.c_void_p) for name in ("key_scale", "key_offset", "value_scale", "value_offset")),
        *((name, ctypes.c_long) for name in ("tokens", "bias_stride", "group", "width", "bits")),
    ]


@dataclass(frozen=True)
class Prepared:
    """Segments and how the kernel finds them. longest: tokens of the longest one."""

    segments: Sequence[Operands]
    longest: int
    structures: Any
    # What the structures point to.
    pointers: Sequence[Any]

    def tensors(self) -> Iterator[Tensor]:
        """Those of the segments."""
        for segment in self.segments:
            yield from segment.tensors()


def is_available(size: int) -> bool:
    """Whether there is a kernel for heads of this size on this machine."""
    return size % _LANES == 0 and 0 < size <= MAX_SIZE and _function() is not None


def prepare(segments: Sequence[Operands]) -> Prepared:
    """Segments as the kernel reads them, for as many tokens as they stay."""
    structures = (_Segment * len(segments))()
    pointers: list[Any] = []
    for segment, to in zip(segments, structures, strict=True):
        to.tokens = segment.tokens
        if isinstance(segment, DenseOperands):
            heads = len(segment.keys)
            addresses = ctypes.c_void_p * heads
            own = (
                addresses(*(part.data_ptr() for part in segment.keys)),
                addresses(*(part.data_ptr() for part in segment.values)),
                (ctypes.c_long * heads)(*map(len, segment.keys)),
            )
            pointers += own
            to.keys, to.values, to.lengths = (ctypes.addressof(part) for part in own)
            if segment.bias is not None:
                to.bias, to.bias_stride = segment.bias.data_ptr(), segment.bias.shape[1]
            continue
        keys, values = segment.keys, segment.values
        assert keys.offset is not None
        assert values.offset is not None
        grids = (keys.scale, keys.offset, values.scale, values.offset)
        assert all(part.dtype == torch.float16 and part.is_contiguous() for part in grids)
        assert keys.words.is_contiguous()
        assert values.words.is_contiguous()
        to.keys, to.values = keys.words.data_ptr(), values.words.data_ptr()
        to.key_scale, to.key_offset, to.value_scale, to.value_offset = (part.data_ptr() for part in grids)
        to.group, to.width, to.bits = keys.group_size, values.group_size, keys.bits
    return Prepared(tuple(segments), max((part.tokens for part in segments), default=0), structures, pointers)


def segmented_token(
    qkv: Tensor,
    turns: Tensor,
    turned: int,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    position: int,
    place: int,
    segments: Prepared,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See hasten.kernels.segmented_token.segmented_token."""
    function = _function()
    assert function is not None
    kv_heads, capacity, size = keys.shape
    heads, count = len(qkv) - 2 * kv_heads, len(segments.segments)
    room = -(-max(segments.longest, place + 1) // _LANES) * _LANES
    output, queries = torch.empty(heads * size), torch.empty(heads, size)
    denominators = torch.empty(heads)
    scratch = torch.empty(heads * room + (count + 1) * heads * (size + 2))
    scores = scratch.data_ptr()
    function(
        qkv.data_ptr(),
        turns.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        positions.data_ptr(),
        segments.structures,
        output.data_ptr(),
        queries.data_ptr(),
        denominators.data_ptr(),
        scores,
        scores + 4 * heads * room,
        turned,
        position,
        place,
        count,
        heads,
        kv_heads,
        size,
        capacity,
        room,
        scale,
        cap or 0.0,
        torch.get_num_threads(),
    )
    return output, queries, denominators


@cache
def _function() -> Callable[..., None] | None:
    library = load_library(SOURCE)
    if library is None:
        return None
    function: Callable[..., None] = library.segmented_token
    pointers, longs = [ctypes.c_void_p] * 11, [ctypes.c_long] * 9
    library.segmented_token.argtypes = [*pointers, *longs, ctypes.c_float, ctypes.c_float, ctypes.c_int]
    library.segmented_token.restype = None
    return function
