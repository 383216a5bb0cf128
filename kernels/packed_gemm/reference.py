"""Dequantization of a packed weight and its product, in plain torch."""

import torch
from torch import Tensor

from hasten.kernels.packed_weight import PackedWeight, unpack_codes


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight (R, C), computed in dtype."""
    codes = unpack_codes(weight.codes, weight.bits, weight.columns).to(dtype)
    groups = weight.scale.shape[1]
    index = weight.group_index
    if index is None:
        index = torch.arange(groups, device=codes.device).repeat_interleave(weight.columns // groups)
    index = index.long()
    middle = float(2 ** (weight.bits - 1))
    zero_point = middle if weight.zero_point is None else weight.zero_point.to(dtype)[:, index]
    return (codes - zero_point) * weight.scale.to(dtype)[:, index]


def packed_gemm(x: Tensor, weight: PackedWeight) -> Tensor:
    """Product (N, R) in the dtype of x; see hasten.kernels.packed_gemm.packed_gemm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ dequantize(weight, wide).T).to(x.dtype)
