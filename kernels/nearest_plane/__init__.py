"""Columns of a weight rounded one after another, where each one's error changes what is wanted of those that are left.

The inner loop of GPTQ: Babai's nearest plane, see hasten/accel/compression/quantizers/gptq.py. A weight (C, R) has one
column of the layer in each of its rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_c
from hasten.kernels.grid_rounding import Points
from hasten.kernels.nearest_plane import c_kernel, reference

__all__ = ["Plane", "visit"]


@dataclass(frozen=True)
class Plane:
    """A block of K columns, and what is found of them.

    target: (K, R) float32, the weights. lower: (K, K) float32, what the error of a column adds to those before it.
    scales, zeros: (G, R) float32. groups: int64 (K,) in main memory, the row of scales and zeros of each column.
    points: the grid. dtype: what values are rounded to. carried: (K, R) float32, what is added to the weights that are
    not visited yet. codes: uint8, residual, error: float32, (K, R) each, which `visit` writes: the error is that of the
    weights with what was carried to them.
    """

    target: Tensor
    lower: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    points: Points
    dtype: torch.dtype
    carried: Tensor
    codes: Tensor
    residual: Tensor
    error: Tensor


def visit(plane: Plane, first: int, last: int) -> None:
    """Round columns last - 1 down to `first`, and carry their errors to all columns before."""
    uses_c = use_c(plane.target) and plane.dtype in c_kernel.DTYPES and c_kernel.is_available()
    (c_kernel if uses_c else reference).visit(plane, first, last)
