"""Fast Walsh-Hadamard transform of rows, with quantization per row.

A row of m * 2**k numbers is multiplied by the Kronecker product of a Hadamard matrix of order m (12, 20 or 28, by
Paley's constructions) and Sylvester's of order 2**k, divided by the root of the order: an orthogonal matrix.
"""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.row_quantization import check_dtype
from hasten.kernels.walsh_hadamard import reference
from hasten.kernels.walsh_hadamard.reference import factors, hadamard_matrix

__all__ = ["factors", "hadamard_matrix", "walsh_hadamard"]


def walsh_hadamard(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Transformed rows of x (N, C), and their scale (N, 1) float32 if quantized.

    C is a power of 2, or 12, 20 or 28 times one. dtype: None returns x's dtype and no scale; torch.int8 or
    torch.float8_e4m3fn return codes of that type.
    """
    check_dtype(dtype)
    factors(x.shape[1])
    if use_triton(x):
        from hasten.kernels.walsh_hadamard import triton_kernel

        if x.shape[1] <= triton_kernel.MAX_COLUMNS:
            return triton_kernel.walsh_hadamard(x, dtype)
    return reference.walsh_hadamard(x, dtype)
