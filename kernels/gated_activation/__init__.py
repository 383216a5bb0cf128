"""Gated activation of a feed-forward layer, act(gate) * up, with quantization per row."""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.gated_activation import reference
from hasten.kernels.gated_activation.reference import ACTIVATIONS
from hasten.kernels.row_quantization import check_dtype

__all__ = ["ACTIVATIONS", "gated_activation"]


def gated_activation(
    x: Tensor, activation: str = "silu", dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Values (N, I) and scale of x (N, 2 * I), whose first half is the gate and whose second half is up.

    activation: silu or gelu_tanh. dtype: None returns values in x's dtype, and no scale; torch.int8 or
    torch.float8_e4m3fn return codes of that type and scale (N, 1) float32.
    """
    check_dtype(dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not supported: use one of {', '.join(ACTIVATIONS)}")
    if x.shape[1] % 2:
        raise ValueError(f"x must have an even number of columns, a gate and an up half, got {x.shape[1]}")
    if use_triton(x):
        from hasten.kernels.gated_activation import triton_kernel

        return triton_kernel.gated_activation(x, activation, dtype)
    return reference.gated_activation(x, activation, dtype)
