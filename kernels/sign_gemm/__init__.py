"""Product of activations and a weight of packed signs (two-binary, sign + low rank), unpacked in registers."""

from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.sign_gemm import reference
from hasten.kernels.sign_gemm.layout import SignWeight


def sign_gemm(x: Tensor, weight: SignWeight) -> Tensor:
    """Product (N, R) in the dtype of x (N, C), a float dtype, with a weight (R, C)."""
    if use_triton(x):
        # Imported here because importing triton takes seconds, and most processes have no GPU.
        from hasten.kernels.sign_gemm import triton_kernel

        return triton_kernel.sign_gemm(x, weight)
    return reference.sign_gemm(x, weight)
