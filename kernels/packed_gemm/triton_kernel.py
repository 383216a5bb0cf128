"""Products with packed integer weights in Triton. Imported on first use, because importing triton takes seconds."""

from torch import Tensor

from hasten.kernels.packed_gemm import triton_launch
from hasten.kernels.packed_gemm.choice import Configuration
from hasten.kernels.packed_weight import PackedWeight


def packed_gemm(x: Tensor, weight: PackedWeight, chosen: Configuration | None = None) -> Tensor:
    """Product (N, R) in the dtype of x; see hasten.kernels.packed_gemm.packed_gemm.

    x: (N, C) float32, float16 or bfloat16. For chosen see triton_launch.product.
    """
    return triton_launch.product(x, _codes(weight), chosen)


def tune(x: Tensor, weight: PackedWeight) -> Configuration:
    """Measures configurations for this product; see triton_launch.tune."""
    return triton_launch.tune(x, _codes(weight))


def _codes(weight: PackedWeight) -> triton_launch.Codes:
    return triton_launch.Codes(
        weight.codes,
        weight.scale,
        weight.columns,
        weight.bits,
        group=weight.columns // weight.scale.shape[1],
        middle=2.0 ** (weight.bits - 1),
        zero_point=weight.zero_point,
        group_index=weight.group_index,
    )
