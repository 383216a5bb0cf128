"""Rotary embedding and writing into the cache in plain torch."""

import torch
from torch import Tensor

from hasten.kernels.rms_norm.reference import rms_norm


def rotary_append(
    qkv: Tensor,
    cis: Tensor,
    rotations: Tensor,
    cache: Tensor,
    slots: Tensor,
    places: Tensor,
    interleaved: bool,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    block_table: Tensor | None = None,
) -> Tensor:
    """See hasten.kernels.rotary_append.rotary_append."""
    kv_heads = cache.shape[1] // 2
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    queries, keys, values = wide.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if query_norm is not None and key_norm is not None:
        queries = rms_norm(queries, query_norm.to(wide.dtype), eps)
        keys = rms_norm(keys, key_norm.to(wide.dtype), eps)
    table = cis[rotations.long()][:, None].to(wide.dtype)
    queries, keys = _rotate(queries, table, interleaved), _rotate(keys, table, interleaved)
    written = slots >= 0
    slots, places = slots[written].long(), places[written].long()
    if block_table is not None:
        slots, places = block_table[slots, places // cache.shape[2]].long(), places % cache.shape[2]
    cache[slots, :, places] = torch.cat([keys, values], 1)[written].to(cache.dtype)
    return queries.to(qkv.dtype)


def _rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    cos, sin = table.unbind(-1)
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    one, other = rotated.unflatten(-1, (half, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    pairs = one * cos - other * sin, other * cos + one * sin
    rotated = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([rotated, rest], -1)
