"""Attention of one new token over a compressed cache, in plain torch."""

import torch
from torch import Tensor

from hasten.kernels.packed_attention import reference as packed
from hasten.kernels.segment_attention import reference as dense
from hasten.kernels.segmented_token.c_kernel import Prepared
from hasten.kernels.segmented_token.operands import PackedOperands


def segmented_token(
    qkv: Tensor,
    turns: Tensor,
    turned: int,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    position: int,
    place: int,
    segments: Prepared,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See hasten.kernels.segmented_token.segmented_token."""
    kv_heads = len(keys)
    heads = len(qkv) - 2 * kv_heads
    one, other = qkv[: heads + kv_heads, :turned].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns[: turned // 2].unbind(-1)
    rest = qkv[: heads + kv_heads, turned:]
    rotated = torch.cat([one * cos - other * sin, other * cos + one * sin, rest], -1)
    queries = rotated[:heads]
    keys[:, place], values[:, place], positions[place] = rotated[heads:], qkv[heads + kv_heads :], position
    rows = queries.unflatten(0, (kv_heads, -1))
    partials = []
    for segment in segments.segments:
        if isinstance(segment, PackedOperands):
            partials.append(packed.packed_attention(rows, segment.keys, segment.values, scale, cap))
        elif segment.bias is None:
            partials.append(dense.segment_attention(rows, segment.keys, segment.values, scale, cap, None, None))
        else:
            own = torch.stack(list(segment.keys)), torch.stack(list(segment.values))
            partials.append(dense.segment_attention(rows, *own, scale, cap, None, segment.bias))
    behind = keys[:, : place + 1], values[:, : place + 1]
    partials.append(dense.segment_attention(rows, *behind, scale, cap, None, None))
    output, denominators = dense.merged_attention(partials, None)
    return output.flatten(), queries, denominators.flatten()
