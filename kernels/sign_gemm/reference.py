"""Dequantization of a weight of signs and its product, in plain torch."""

import torch
from torch import Tensor

from hasten.kernels.sign_gemm.layout import SignWeight, unpack_signs


def dequantize(weight: SignWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight (R, C), computed in dtype."""
    binary = unpack_signs(weight.signs, weight.columns).to(dtype)
    if not weight.zero_one:
        binary = 2 * binary - 1
    scale = weight.scale.to(dtype).repeat_interleave(weight.columns // weight.scale.shape[2], 2)
    dense = (binary * scale).sum(1)
    if weight.left is not None and weight.right is not None:
        dense += weight.left.to(dtype) @ weight.right.to(dtype)
    return dense


def sign_gemm(x: Tensor, weight: SignWeight) -> Tensor:
    """Product (N, R) in the dtype of x; see hasten.kernels.sign_gemm.sign_gemm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ dequantize(weight, wide).T).to(x.dtype)
