"""Product of a few float32 rows and a weight that is exact in bfloat16, as the weights of most checkpoints are.

A decoding pass reads every weight for a few rows, so it is bound by memory bandwidth: half the bytes take half the
time, and no value changes. The weight is packed into panels of 32 outputs, in the order in which the kernel reads it,
and is widened to float32 in registers, as many outputs at once as a register holds.

The order of summation is the same for any number of rows and threads, so a token gets the same products alone, as a
node of a tree and in a prompt, to the bit. It is also the same on all processors that multiply and add in one
instruction. On a machine where the kernel is slower than torch, torch is used for all numbers of rows; its products
then differ by rounding errors between numbers of rows.
"""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_c
from hasten.kernels.skinny_gemm import c_kernel, choice, reference


def pack_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """Panels (P, C, 16, 2) bfloat16 of a weight (R, C), R padded with zeros to 32 P.

    dtype: of the rows that it will multiply; None is the weight's own. None if skinny_gemm would not be faster than
    torch (rows are not float32, there is no compiled kernel, or torch was faster when both were timed on this machine),
    or if a value is not exact in bfloat16.
    """
    if not use_c(weight.new_empty(0, dtype=dtype or weight.dtype)) or not c_kernel.is_available():
        return None
    exact = exact_bfloat16(weight) if choice.is_faster() else None
    return None if exact is None else reference.pack_panels(exact)


def exact_bfloat16(weight: Tensor) -> Tensor | None:
    """The weight in bfloat16; None if that changes a value."""
    reduced = weight.to(torch.bfloat16)
    return reduced if torch.equal(reduced.to(weight.dtype), weight) else None


def skinny_gemm(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """Product (N, R) float32 of rows x (N, C) float32 and a packed weight of R = outputs rows.

    The product's row stride may exceed R, because R is padded to whole panels.
    """
    kernel = c_kernel if use_c(x) and c_kernel.is_available() else reference
    return kernel.skinny_gemm(x, packed, outputs)
