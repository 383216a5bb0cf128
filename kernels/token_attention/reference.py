"""Attention of one new token, in plain torch."""

import torch
from torch import Tensor


def token_attention(
    qkv: Tensor, turns: Tensor, cache: Tensor, position: int, first: int, scale: float, cap: float | None
) -> Tensor:
    """Output (H * G * D,) of one token; see hasten.kernels.token_attention.token_attention."""
    size, kv_heads = cache.shape[-1], cache.shape[0] // 2
    rows = qkv.view(-1, size)
    heads = len(rows) - 2 * kv_heads
    one, other = rows[: heads + kv_heads].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind(-1)
    rows[: heads + kv_heads] = torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2)
    cache[:, position] = rows[heads:]
    keys, values = cache[:, first : position + 1].chunk(2)
    scores = rows[:heads].view(kv_heads, -1, size) @ keys.mT * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return (scores.softmax(-1) @ values).flatten()
