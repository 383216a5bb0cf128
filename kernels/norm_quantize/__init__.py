"""RMS norm of rows, with the addition of a residual before it and quantization per row after it, in one pass."""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.norm_quantize import reference
from hasten.kernels.norm_quantize.reference import Normalised
from hasten.kernels.row_quantization import check_dtype

__all__ = ["Normalised", "norm_quantize"]


def norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Normalised:
    """RMS norm of x (N, C), or of x + residual, times weight (C,).

    residual: (N, C) of x's dtype; the sum is rounded to that dtype before the norm, and returned. dtype: torch.int8 or
    torch.float8_e4m3fn, the type of the codes; None returns the norm in x's dtype.
    """
    check_dtype(dtype)
    if use_triton(x):
        from hasten.kernels.norm_quantize import triton_kernel

        return triton_kernel.norm_quantize(x, weight, eps, residual, dtype)
    return reference.norm_quantize(x, weight, eps, residual, dtype)
