"""Sum of x xᵀ over tokens, of which only one half is stored.

The sums of C columns lie in panels: blocks of `width` rows, each with the columns up to the end of its diagonal square.
Products and sums are of float32, also where x is of bfloat16.
"""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_c, use_triton
from hasten.kernels.second_moment import c_kernel, reference
from hasten.kernels.second_moment.reference import panel_bounds, panels

__all__ = ["add", "panel_bounds", "panels", "spread"]


def add(sums: Tensor, x: Tensor, width: int) -> None:
    """Add the rows of x (N, C), float32 or another floating type, to the sums: all panels, concatenated, float32."""
    # Of float32, cuBLAS's product is taken: without tensor cores there is nothing that the kernel does better.
    if use_triton(sums) and x.dtype in (torch.bfloat16, torch.float16):
        from hasten.kernels.second_moment import triton_kernel

        triton_kernel.add(sums, x, width)
    elif use_c(sums) and c_kernel.is_faster(x.dtype):
        c_kernel.add(sums, x, width)
    else:
        reference.add(sums, x, width)


def spread(panel: Tensor, start: int, place: Tensor, tokens: int, out: Tensor) -> None:
    """Write a panel, divided by tokens, to a matrix out (C, C), contiguous float32, below and above its diagonal.

    panel: rows `start` and on. place: int64 (C,), the row and column of `out` that each column of the inputs has.
    """
    module = c_kernel if use_c(out) and c_kernel.is_available() else reference
    module.spread(panel, start, place, tokens, out)
