"""Attention of one new token on a CPU: its query and key are rotated, its key and value are written into the cache.

A token of a small model spends more time between the operations of torch that do this than in them.
"""

import torch
from torch import Tensor

from hasten.kernels.token_attention import c_kernel, reference


def is_faster(cache: Tensor) -> bool:
    """Whether there is a compiled kernel for caches like this one (…, capacity, D)."""
    on_cpu = cache.device.type == "cpu" and cache.dtype == torch.float32
    return on_cpu and c_kernel.is_available(cache.shape[-1])


def token_attention(
    qkv: Tensor, turns: Tensor, cache: Tensor, position: int, first: int, scale: float, cap: float | None = None
) -> Tensor:
    """Output (H * G * D,) float32 of the token at `position`, which attends to cache positions `first` to its own.

    qkv: (H * G + 2 * H, D) float32, contiguous: its queries, keys and values before their rotation; overwritten. turns:
    (D / 2, 2) cosines and sines for adjacent pairs of numbers. cache: (2 * H, capacity, D), contiguous: keys, then
    values; the token's own are written. scale: of scores. cap: magnitude of their soft cap; None for none.
    """
    kernel = c_kernel if is_faster(cache) else reference
    return kernel.token_attention(qkv, turns, cache, position, first, scale, cap)
