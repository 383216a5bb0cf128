"""Quantization per row (token): the types of codes, and the definition in plain torch."""

import torch
from torch import Tensor

# Largest magnitude of a code. int8 is symmetric: -128 is not used.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A row of zeros has this maximum, so that its scale can be divided by.
LEAST = 1e-30


def check_dtype(dtype: torch.dtype | None) -> None:
    """ValueError if codes cannot have this type; None, which stands for no quantization, is accepted."""
    if dtype is not None and dtype not in LIMITS:
        raise ValueError(f"dtype={dtype} is not supported: use None or one of {', '.join(map(str, LIMITS))}")


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (..., C) and scale (..., 1) float32 of x (..., C): x is about codes * scale."""
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    scaled = x * (LIMITS[dtype] / absmax)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), (absmax / LIMITS[dtype]).float()
