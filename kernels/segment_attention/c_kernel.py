"""Calls segment_attention.c, which is compiled at first use."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.attention.contract import Partial
from hasten.kernels.compiled import load_library

SOURCE = Path(__file__).with_name("segment_attention.c")
MAX_SIZE = 256
# Of the widest vectors, in floats.
_LANES = 16


def is_available(size: int) -> bool:
    """Whether there is a kernel for heads of this size on this machine."""
    return size % _LANES == 0 and 0 < size <= MAX_SIZE and _functions() is not None


def segment_attention(
    queries: Tensor,
    keys: Sequence[Tensor] | Tensor,
    values: Sequence[Tensor] | Tensor,
    scale: float,
    cap: float | None,
    seen: Tensor | None,
    bias: Tensor | None,
) -> Partial:
    """See hasten.kernels.segment_attention.segment_attention."""
    functions = _functions()
    assert functions is not None
    heads, rows, size = queries.shape
    queries = queries.contiguous()
    (keys, key_pointers), (values, value_pointers) = (_by_head(part) for part in (keys, values))
    lengths = (ctypes.c_long * heads)(*([keys.shape[1]] * heads if isinstance(keys, Tensor) else map(len, keys)))
    room = -(-max(lengths) // _LANES) * _LANES
    seen = None if seen is None else seen.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    o, scores = torch.empty(heads, rows, size), torch.empty(heads * rows * room)
    m, total = torch.empty(heads, rows), torch.empty(heads, rows)
    functions[0](
        queries.data_ptr(),
        key_pointers,
        value_pointers,
        lengths,
        None if seen is None else seen.data_ptr(),
        None if bias is None else bias.data_ptr(),
        *(part.data_ptr() for part in (o, m, total, scores)),
        heads,
        rows,
        size,
        room,
        0 if seen is None or seen.ndim == 2 else seen.stride(0),
        1 if seen is None else seen.shape[-2],
        0 if seen is None else seen.shape[-1],
        0 if bias is None else bias.shape[-1],
        scale,
        cap or 0.0,
        torch.get_num_threads(),
    )
    return Partial(o, m, total)


def merged_attention(partials: Sequence[Partial], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """See hasten.kernels.segment_attention.merged_attention."""
    functions = _functions()
    assert functions is not None
    partials = [Partial(*(part.contiguous() for part in partial)) for partial in partials]
    sinks = None if sinks is None else sinks.float().contiguous()
    output, denominators = torch.empty_like(partials[0].o), torch.empty_like(partials[0].m)
    functions[1](
        *(_pointers(part) for part in zip(*partials, strict=True)),
        None if sinks is None else sinks.data_ptr(),
        output.data_ptr(),
        denominators.data_ptr(),
        len(partials),
        denominators.numel(),
        output.shape[-1],
        1 if sinks is None else len(sinks),
    )
    return output, denominators


def _by_head(part: Sequence[Tensor] | Tensor) -> tuple[Sequence[Tensor] | Tensor, Any]:
    """Keys or values whose rows are adjacent in memory, and pointers to the first row of each head."""
    if not isinstance(part, Tensor):
        part = [own.contiguous() for own in part]
        return part, _pointers(part)
    _, count, size = part.shape
    if count > 1 and part.stride()[1:] != (size, 1):
        part = part.contiguous()
    start, step = part.data_ptr(), part.stride(0) * part.element_size()
    return part, (ctypes.c_void_p * len(part))(*[start + head * step for head in range(len(part))])


def _pointers(tensors: Iterable[Tensor]) -> Any:
    addresses = [tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


@cache
def _functions() -> tuple[Callable[..., None], Callable[..., None]] | None:
    library = load_library(SOURCE)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.segment_attention.argtypes = [
        *[pointer] * 10,
        *[number] * 8,
        ctypes.c_float,
        ctypes.c_float,
        ctypes.c_int,
    ]
    library.merged_attention.argtypes = [*[pointer] * 6, *[number] * 4]
    library.segment_attention.restype = library.merged_attention.restype = None
    return library.segment_attention, library.merged_attention
