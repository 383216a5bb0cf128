"""Gated activation in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.row_quantization import quantize_rows

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh")}


def gated_activation(
    x: Tensor, activation: str = "silu", dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """See hasten.kernels.gated_activation.gated_activation."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    product = ACTIVATIONS[activation](gate) * up
    return (product.to(x.dtype), None) if dtype is None else quantize_rows(product, dtype)
