"""Calls grid_rounding.c, which is compiled at first use."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hasten.kernels.compiled import load_library
from hasten.kernels.grid_rounding.reference import Points

SOURCE = Path(__file__).with_name("grid_rounding.c")
DTYPES = (torch.float32, torch.bfloat16)
_KINDS = {("int", None): 0, ("float", 8): 1, ("float", 4): 2}


def is_available() -> bool:
    """Whether the kernel can be compiled on this machine."""
    return _library() is not None


def losses(groups: Tensor, scale: Tensor, zero: Tensor | None, points: Points) -> Tensor:
    """See hasten.kernels.grid_rounding.losses; the kernel must be available."""
    loss = torch.empty(scale.shape)
    _call(_required().grid_losses, groups, scale, zero, loss, points, points.top)
    return loss


def encode(groups: Tensor, scale: Tensor, zero: Tensor | None, points: Points) -> Tensor:
    """See hasten.kernels.grid_rounding.encode; the kernel must be available."""
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    _call(_required().grid_encode, groups, scale, zero, codes, points, points.top)
    return codes


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, points: Points, dtype: torch.dtype) -> Tensor:
    """See hasten.kernels.grid_rounding.decode; the kernel must be available."""
    out = torch.empty(codes.shape, dtype=dtype if dtype in DTYPES else torch.float32)
    _call(_required().grid_decode, codes, scale, zero, out, points, out.dtype == torch.bfloat16)
    return out.to(dtype)


def round_scaled(x: Tensor, scale: Tensor, kind: str, bits: int, low: float, high: float) -> Tensor:
    """See hasten.kernels.grid_rounding.round_scaled; the kernel must be available, and x of one of DTYPES."""
    narrow = scale.dtype == x.dtype == torch.bfloat16
    x, scale = x.contiguous(), scale.expand(*x.shape[:-1], 1).float().contiguous()
    out, number = torch.empty_like(x), _KINDS[kind, None if kind == "int" else bits]
    parts = x.data_ptr(), scale.data_ptr(), out.data_ptr(), scale.numel(), x.shape[-1], number, low, high
    _required().grid_round(*parts, x.dtype == torch.bfloat16, narrow, torch.get_num_threads())
    return out


def absmax(x: Tensor) -> Tensor:
    """See hasten.kernels.grid_rounding.absmax; the kernel must be available, and x of one of DTYPES."""
    x = x.contiguous()
    largest = torch.empty(*x.shape[:-1], 1)
    parts = x.data_ptr(), largest.data_ptr(), largest.numel(), x.shape[-1]
    _required().grid_absmax(*parts, x.dtype == torch.bfloat16, torch.get_num_threads())
    return largest.to(x.dtype)


def kind_of(points: Points) -> int:
    """Number of a kind of values in the C sources."""
    return _KINDS[points.kind, points.bits if points.kind == "float" else None]


def _call(
    function: Callable[..., None],
    groups: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    out: Tensor,
    points: Points,
    option: float,
) -> None:
    """Call a function on numbers or codes (..., C) of groups. option: what it takes besides their kind."""
    given = [None if part is None else part.contiguous() for part in (groups, scale, zero)]
    addresses = (None if part is None else part.data_ptr() for part in (*given, out))
    function(*addresses, scale.numel(), groups.shape[-1], kind_of(points), option, torch.get_num_threads())


def _required() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@cache
def _library() -> ctypes.CDLL | None:
    # Codes of bytes and numbers of 16 bits are taken from words.
    library = load_library(SOURCE) if sys.byteorder == "little" else None
    if library is None:
        return None
    pointer, long, number, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
    library.grid_losses.argtypes = [*[pointer] * 4, long, long, flag, number, flag]
    library.grid_encode.argtypes = library.grid_losses.argtypes
    library.grid_decode.argtypes = [*[pointer] * 4, long, long, flag, flag, flag]
    library.grid_round.argtypes = [*[pointer] * 3, long, long, flag, number, number, flag, flag, flag]
    library.grid_absmax.argtypes = [pointer, pointer, long, long, flag, flag]
    for function in ("losses", "encode", "decode", "round", "absmax"):
        getattr(library, f"grid_{function}").restype = None
    return library
