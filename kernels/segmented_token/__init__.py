"""Attention of one new token over a compressed cache on a CPU: its query and key are rotated, its key and value stored.

It does for the segments of a cache, and the dense tokens behind them, what kernels/token_attention does for a dense
cache: a token of a small model spends more time between the operations of torch that do this than in them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels.packed_attention import is_faster as reads_packed
from hasten.kernels.segmented_token import c_kernel, reference
from hasten.kernels.segmented_token.c_kernel import Prepared, prepare
from hasten.kernels.segmented_token.operands import DenseOperands, Operands, PackedOperands

__all__ = ["DenseOperands", "Operands", "PackedOperands", "Prepared", "prepare", "reads", "segmented_token"]


def reads(segments: Sequence[Operands], keys: Tensor) -> bool:
    """Whether there is a compiled kernel for these segments, with keys (H, capacity, D) of dense tokens behind them."""
    size = keys.shape[2]
    dense = [part for segment in segments if isinstance(segment, DenseOperands) for part in segment.tensors()]
    return (
        c_kernel.is_available(size)
        and all(
            part.device.type == "cpu" and part.dtype == torch.float32 and part.is_contiguous()
            for part in (keys, *dense)
        )
        and all(reads_packed(part.keys, part.heads) for part in segments if isinstance(part, PackedOperands))
    )


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
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (H * G * D,) of the token at `position`, which attends to all segments and to rows up to `place`, its own.

    With it, the queries (H * G, D), rotated, and the logarithms (H * G,) of the denominators of their softmax.

    qkv: (H * G + 2 * H, D) float32, contiguous: queries, keys and values before their rotation. turns: (D / 2, 2)
    cosines and sines for adjacent pairs of numbers, of which the first `turned` numbers are rotated; all first numbers
    of pairs are stored before all second ones. keys, values: (H, capacity, D), contiguous, and positions (capacity,)
    int32: the token's own are written. scale: of scores. cap: magnitude of their soft cap; None for none.
    """
    kernel = c_kernel if reads(segments.segments, keys) else reference
    return kernel.segmented_token(qkv, turns, turned, keys, values, positions, position, place, segments, scale, cap)
