"""RMS norm and quantization in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor

from hasten.kernels.rms_norm.reference import rms_norm
from hasten.kernels.row_quantization import quantize_rows


class Normalised(NamedTuple):
    """values (N, C): the norm, or its codes. scale (N, 1) float32: values * scale is the norm; None if not quantized.

    residual (N, C): the sum whose norm it is; None if there was nothing to add.
    """

    values: Tensor
    scale: Tensor | None
    residual: Tensor | None


def norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Normalised:
    """See hasten.kernels.norm_quantize.norm_quantize."""
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    norm = rms_norm(wide, weight.to(wide.dtype), eps)
    new_residual = None if residual is None else summed
    if dtype is None:
        return Normalised(norm.to(x.dtype), None, new_residual)
    return Normalised(*quantize_rows(norm, dtype), new_residual)
