"""Rotary embedding of queries and keys, and writing of keys and values into the cache, in one launch."""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.rotary_append import reference


def rotary_append(
    qkv: Tensor,
    cis: Tensor,
    rotations: Tensor,
    cache: Tensor,
    slots: Tensor,
    places: Tensor,
    *,
    interleaved: bool,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    block_table: Tensor | None = None,
) -> Tensor:
    """Rotated queries (N, heads, D) of new tokens; their keys and values are written into the cache in place.

    qkv (N, heads + 2 * H, D): query heads, then key and value heads. cis (P, R / 2, 2) float32: cosine and sine of each
    position and pair; the first R elements of a head are rotated. interleaved: pairs are (2 i, 2 i + 1), else
    (i, i + R / 2). rotations (N,): row of cis, the token's position in its sequence. cache (slots, 2 * H, capacity, D):
    keys, then values; token n is written to slots[n], places[n], or nowhere if the slot is negative. query_norm,
    key_norm (D,): weights of RMS norms of each query and key head before the rotation; both or neither. block_table
    (slots, pages) integers: the cache is (all pages, 2 * H, page size, D), and a slot's place lies in the page
    block_table[slot, place // page size].
    """
    size, rotated = qkv.shape[2], 2 * cis.shape[1]
    if size % 2 or rotated > size:
        raise ValueError(f"the head size must be even and at least the {rotated} rotated dimensions, got {size}")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm must be given together")
    if cis.dtype != torch.float32:
        raise ValueError(f"cis must be float32, because rotations of far positions need it, got {cis.dtype}")
    if use_triton(qkv):
        from hasten.kernels.rotary_append import triton_kernel

        run = triton_kernel.rotary_append
    else:
        run = reference.rotary_append
    return run(qkv, cis, rotations, cache, slots, places, interleaved, query_norm, key_norm, eps, block_table)
