"""Rounding to the values of a grid: integers with a zero point, or floats of 8 or 4 bits, times a scale.

Numbers that share a scale lie in the last dimension. On a CPU with a C compiler each op is one pass over the numbers,
where torch makes one for each operation.
"""

from types import ModuleType

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_c
from hasten.kernels.grid_rounding import c_kernel, reference
from hasten.kernels.grid_rounding.reference import Points

__all__ = ["Points", "absmax", "decode", "encode", "losses", "round_scaled"]


def losses(groups: Tensor, scale: Tensor, zero: Tensor | None, points: Points) -> Tensor:
    """Squared error (...) of rounding the numbers (..., C) of each group. All are float32. scale, zero: (...).

    zero: of integers; None is 0. Floats have none, and do not read it.
    """
    return _module(groups).losses(groups, scale, zero, points)


def encode(groups: Tensor, scale: Tensor, zero: Tensor | None, points: Points) -> Tensor:
    """Codes uint8 (..., C) of the nearest values to numbers (..., C); for the arguments see losses."""
    return _module(groups).encode(groups, scale, zero, points)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, points: Points, dtype: torch.dtype) -> Tensor:
    """Numbers (..., C) of codes uint8 (..., C), rounded to dtype once; for the other arguments see losses."""
    return _module(scale).decode(codes, scale, zero, points, dtype)


def round_scaled(x: Tensor, scale: Tensor, kind: str, bits: int, low: float, high: float) -> Tensor:
    """x (..., C) rounded to values between low and high times scale (..., 1), in the dtype of x.

    kind: `int` for whole numbers, or `float` of 8 or 4 bits. The quotient is rounded as torch's division rounds it: to
    bfloat16 where x and scale both are. scale may have fewer dimensions, or be broadcast.
    """
    return _module(x).round_scaled(x, scale, kind, bits, low, high)


def absmax(x: Tensor) -> Tensor:
    """Largest magnitude (..., 1) of x (..., C), in its dtype."""
    return _module(x).absmax(x)


def _module(tensor: Tensor) -> ModuleType:
    return c_kernel if use_c(tensor, c_kernel.DTYPES) and c_kernel.is_available() else reference
