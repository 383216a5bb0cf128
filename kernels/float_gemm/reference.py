"""Dequantization of a weight of small floats and its product, in plain torch."""

import torch
from torch import Tensor

from hasten.kernels.float_gemm.layout import BLOCK, FloatWeight, unpack_e2m1


def dequantize(weight: FloatWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight (R, C), computed in dtype."""
    rows, columns = weight.shape
    scale = weight.scale
    if weight.codes.dtype == torch.float8_e4m3fn:
        values = weight.codes.to(dtype)
        if scale.shape[0] not in (1, rows) or scale.shape[1] != 1:
            scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return values * scale.to(dtype)
    values = unpack_e2m1(weight.codes).to(dtype)
    if weight.global_scale is None:
        scale = torch.exp2(scale.to(dtype) - 127)
    else:
        scale = scale.to(dtype) / weight.global_scale.to(dtype)
    return values * scale.repeat_interleave(columns // scale.shape[1], 1)


def float_gemm(x: Tensor, weight: FloatWeight) -> Tensor:
    """Product (N, R) in the dtype of x; see hasten.kernels.float_gemm.float_gemm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ dequantize(weight, wide).T).to(x.dtype)
