"""Products with weights of small floats in Triton, by the kernels of packed integers.

A code is moved to the exponent and the mantissa of a float16, two codes at once, which divides it by a power of two. So no
GPU needs instructions for 8-bit floats. The not-a-number codes of e4m3 are not recognised.
"""

import torch
from torch import Tensor

from hasten.kernels.float_gemm.layout import BLOCK, FloatWeight
from hasten.kernels.packed_gemm import triton_launch
from hasten.kernels.packed_gemm.choice import Configuration

# Differences of the exponent biases: 15 of float16, 7 of e4m3, 1 of e2m1.
_E4M3_FACTOR, _E2M1_FACTOR = 2.0 ** (15 - 7), 2.0 ** (15 - 1)


def float_gemm(x: Tensor, weight: FloatWeight, chosen: Configuration | None = None) -> Tensor:
    """Product (N, R) in the dtype of x; see hasten.kernels.float_gemm.float_gemm.

    x: (N, C) float32, float16 or bfloat16. For chosen see hasten.kernels.packed_gemm.triton_launch.product.
    """
    return triton_launch.product(x, _codes(weight), chosen)


def tune(x: Tensor, weight: FloatWeight) -> Configuration:
    """Measures configurations for this product; see hasten.kernels.packed_gemm.triton_launch.tune."""
    return triton_launch.tune(x, _codes(weight))


def _codes(weight: FloatWeight) -> triton_launch.Codes:
    rows, columns = weight.shape
    stored = weight.codes.view(torch.uint8)
    if stored.shape[1] % 4 or stored.stride(1) != 1 or stored.data_ptr() % 4 or stored.stride(0) % 4:
        # Rows of whole words; no copy for widths of models.
        stored = torch.nn.functional.pad(stored, (0, -stored.shape[1] % 4)).contiguous()
    words = stored.view(torch.int32)
    scale = weight.scale
    if weight.codes.dtype == torch.uint8:
        return triton_launch.Codes(
            words,
            scale.view(torch.uint8),
            columns,
            bits=4,
            group=columns // scale.shape[1],
            middle=0.0,
            is_float=True,
            scale_format="e8m0" if weight.global_scale is None else "e4m3",
            factor=_E2M1_FACTOR,
            alpha=None if weight.global_scale is None else weight.global_scale.float().reciprocal(),
        )
    row_group = {1: rows, rows: 1}.get(scale.shape[0], BLOCK) if scale.shape[1] == 1 else BLOCK
    return triton_launch.Codes(
        words,
        scale,
        columns,
        bits=8,
        group=columns if scale.shape[1] == 1 else BLOCK,
        middle=0.0,
        row_group=row_group,
        is_float=True,
        factor=_E4M3_FACTOR,
    )
