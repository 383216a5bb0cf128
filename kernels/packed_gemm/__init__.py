"""Product of activations and a weight of integer codes, read packed and dequantized in registers."""

from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.packed_gemm import reference
from hasten.kernels.packed_gemm.layout import PackedWeight


def packed_gemm(x: Tensor, weight: PackedWeight) -> Tensor:
    """Product (N, R) in the dtype of x (N, C), a float dtype, with a weight (R, C)."""
    if use_triton(x):
        # Imported here because importing triton takes seconds, and most processes have no GPU.
        from hasten.kernels.packed_gemm import triton_kernel

        return triton_kernel.packed_gemm(x, weight)
    return reference.packed_gemm(x, weight)
