"""Rotary embedding and writing into the cache as a Triton kernel. Imported only on first use: triton takes seconds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # heads of a program


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
    rows, both, size = qkv.shape
    heads = both - cache.shape[1]
    if qkv.stride(1) != size or qkv.stride(2) != 1:
        qkv = qkv.contiguous()
    if cache.stride(3) != 1:
        raise ValueError("the last dimension of the cache must be contiguous")
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    queries = torch.empty(rows, heads, size, dtype=qkv.dtype, device=qkv.device)
    kernel[(rows, triton.cdiv(both, _HEADS))](
        qkv,
        cis.contiguous(),
        rotations.contiguous(),
        cache,
        slots.contiguous(),
        places.contiguous(),
        None if query_norm is None else query_norm.contiguous(),
        None if key_norm is None else key_norm.contiguous(),
        block_table,
        queries,
        heads,
        both,
        both - cache.shape[1] // 2,
        cache.shape[2],
        qkv.stride(0),
        *cache.stride()[:3],
        0 if block_table is None else block_table.stride(0),
        eps,
        size,
        2 * cis.shape[1],
        interleaved,
        _HEADS,
        triton.next_power_of_2(size // 2),
    )
    return queries


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    qkv,
    cis,
    rotations,
    cache,
    slots,
    places,
    query_norm,
    key_norm,
    block_table,
    queries,
    heads,
    both,
    first_value,
    capacity,
    row_stride,
    slot_stride,
    head_stride,
    place_stride,
    table_stride,
    eps,
    SIZE: tl.constexpr,  # noqa: N803
    ROTATED: tl.constexpr,  # noqa: N803
    INTERLEAVED: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    PAIRS: tl.constexpr,  # noqa: N803
):
    """One program handles HEADS heads of one token. Norms and block_table may be None."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    # Elements that are not rotated form pairs, too, which are turned by an angle of 0.
    if INTERLEAVED:
        one = 2 * pair
        other = one + 1
    else:
        turns = pair < ROTATED // 2
        one = tl.where(turns, pair, pair + ROTATED // 2)
        other = one + tl.where(turns, ROTATED // 2, (SIZE - ROTATED) // 2)
    inside = (head < both)[:, None] & (pair < SIZE // 2)[None, :]
    source = qkv + row * row_stride + head[:, None] * SIZE
    a = tl.load(source + one[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + other[None, :], mask=inside, other=0.0).to(tl.float32)
    is_key = (head < first_value)[:, None]  # a query or a key
    if query_norm is not None:
        is_query = (head < heads)[:, None]
        within = pair < SIZE // 2
        query_a = tl.load(query_norm + one, mask=within, other=0.0).to(tl.float32)
        query_b = tl.load(query_norm + other, mask=within, other=0.0).to(tl.float32)
        key_a = tl.load(key_norm + one, mask=within, other=0.0).to(tl.float32)
        key_b = tl.load(key_norm + other, mask=within, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(a * a + b * b, 1) / SIZE + eps)[:, None]
        a = tl.where(is_key, a * inverse * tl.where(is_query, query_a[None, :], key_a[None, :]), a)
        b = tl.where(is_key, b * inverse * tl.where(is_query, query_b[None, :], key_b[None, :]), b)
    angle = cis + tl.load(rotations + row).to(tl.int64) * ROTATED + 2 * pair
    cos = tl.load(angle, mask=pair < ROTATED // 2, other=1.0)[None, :]
    sin = tl.load(angle + 1, mask=pair < ROTATED // 2, other=0.0)[None, :]
    turned = tl.where(is_key, a * cos - b * sin, a)
    b = tl.where(is_key, b * cos + a * sin, b)
    a = turned
    target = queries + (row * heads + head[:, None]) * SIZE
    stored = inside & (head < heads)[:, None]
    tl.store(target + one[None, :], a.to(queries.dtype.element_ty), mask=stored)
    tl.store(target + other[None, :], b.to(queries.dtype.element_ty), mask=stored)
    slot = tl.load(slots + row).to(tl.int64)
    place = tl.load(places + row).to(tl.int64)
    if slot >= 0:
        if block_table is not None:
            slot = tl.load(block_table + slot * table_stride + place // capacity).to(tl.int64)
            place = place % capacity
        target = cache + slot * slot_stride + (head - heads)[:, None].to(tl.int64) * head_stride + place * place_stride
        stored = inside & (head >= heads)[:, None]
        tl.store(target + one[None, :], a.to(cache.dtype.element_ty), mask=stored)
        tl.store(target + other[None, :], b.to(cache.dtype.element_ty), mask=stored)
