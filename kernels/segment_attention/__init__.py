"""Attention of a few queries over one segment of a cache on a CPU, and the merging of the results of several segments.

A small model's token spends more time between the operations of torch that do this than in them. The results are
partial ones, see kernels/attention/contract.py; here rows are the query heads of a KV head times the queries.
"""

from collections.abc import Sequence

from torch import Tensor

from hasten.kernels.attention.contract import Partial
from hasten.kernels.dispatch import use_c
from hasten.kernels.segment_attention import c_kernel, reference

# With more rows of queries than this, a product of matrices reads keys less often.
_MAX_ROWS = 64


def is_faster(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether there is a compiled kernel for these queries, keys and values of a head or of all."""
    sizes = {part.shape[-1] for part in (queries, keys, values)}
    return (
        queries.shape[-2] <= _MAX_ROWS
        and len(sizes) == 1
        and all(use_c(part) for part in (queries, keys, values))
        and c_kernel.is_available(sizes.pop())
    )


def segment_attention(
    queries: Tensor,
    keys: Sequence[Tensor] | Tensor,
    values: Sequence[Tensor] | Tensor,
    scale: float,
    cap: float | None = None,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
) -> Partial:
    """Partial result o (H, N, D), m and l (H, N), float32, of queries (H, N, D) over keys and values (H, T, D).

    keys, values: also one (T_h, D) for each head. scale: of scores. cap: magnitude of their soft cap; None for none.
    seen: (W, T) or (H, W, T) bool, the keys that each query sees, where N = G * W and row g * W + w is query w; None
    for all. bias: (H, T), added to the scores. These two only where heads have equal numbers of keys.
    """
    kernel = c_kernel if is_faster(queries, keys[0], values[0]) else reference
    return kernel.segment_attention(queries, keys, values, scale, cap, seen, bias)


def merged_attention(partials: Sequence[Partial], sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention output (..., R, D) of partial results of several segments, and logarithms (..., R) of its denominators.

    sinks: (R,) logits. A row without keys is 0.
    """
    parts = [part for partial in partials for part in partial]
    kernel = c_kernel if all(map(use_c, parts)) and c_kernel.is_available(parts[0].shape[-1]) else reference
    return kernel.merged_attention(partials, sinks)
