"""Product of activations and a weight of 8- or 4-bit floats (FP8, MXFP4, NVFP4), dequantized in registers."""

from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.float_gemm import reference
from hasten.kernels.float_gemm.layout import FloatWeight


def float_gemm(x: Tensor, weight: FloatWeight) -> Tensor:
    """Product (N, R) in the dtype of x (N, C), a float dtype, with a weight (R, C)."""
    if use_triton(x):
        # Imported here because importing triton takes seconds, and most processes have no GPU.
        from hasten.kernels.float_gemm import triton_kernel

        return triton_kernel.float_gemm(x, weight)
    return reference.float_gemm(x, weight)
