"""Products with weights of signs in Triton, by the kernels of packed integers with codes of one bit.

The planes of a row are read as one row of P * C columns, along which x is repeated. The low-rank part is two products
of torch, of K times as few operations.
"""

import torch
from torch import Tensor

from hasten.kernels.packed_gemm import triton_launch
from hasten.kernels.packed_gemm.choice import Configuration
from hasten.kernels.sign_gemm.layout import SignWeight


def sign_gemm(x: Tensor, weight: SignWeight, chosen: Configuration | None = None) -> Tensor:
    """Product (N, R) in the dtype of x; see hasten.kernels.sign_gemm.sign_gemm.

    x: (N, C) float32, float16 or bfloat16. For chosen see hasten.kernels.packed_gemm.triton_launch.product.
    """
    out = triton_launch.product(x, _codes(weight), chosen)
    if weight.left is None or weight.right is None:
        return out
    return torch.addmm(out, x @ weight.right.T.to(x.dtype), weight.left.T.to(x.dtype))


def tune(x: Tensor, weight: SignWeight) -> Configuration:
    """Measures configurations for this product; see hasten.kernels.packed_gemm.triton_launch.tune."""
    return triton_launch.tune(x, _codes(weight))


def _codes(weight: SignWeight) -> triton_launch.Codes:
    _, planes, groups = weight.scale.shape
    # Of whole words, so that the planes' groups are adjacent.
    columns = weight.signs.shape[2] * 32
    return triton_launch.Codes(
        weight.signs.flatten(1),
        weight.scale.flatten(1),
        weight.columns,
        bits=1,
        group=columns // groups,
        middle=0.0 if weight.zero_one else 0.5,
        planes=planes,
        factor=1.0 if weight.zero_one else 2.0,
    )
