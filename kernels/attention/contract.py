"""What all attention kernels share: the partial result of a segment, and how caches, trees and scores are described.

A segment is a set of keys and values. Attention of a query over it gives a partial result `(o, m, l)`:

    m = max_j s_j        l = sum_j exp(s_j - m)        o = sum_j exp(s_j - m) v_j

over the keys j that the query sees, in float32, with scores s_j in natural units after scale and soft cap. o is not
normalised. A segment of which the query sees no key gives (0, -inf, 0). Partial results of different segments are
combined by log-sum-exp, in any order and grouping, by one operation, `merge`: with M = max of all m,
o = sum exp(m - M) o, l = sum exp(m - M) l, and the attention output is o / l, or 0 if l is 0. A sink is a logit per
query head that adds exp(sink) to the denominator; it is a segment without a value.

Shapes: B sequences, N queries of each, H KV heads, G query heads of a KV head, D head size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 32


class Partial(NamedTuple):
    """Partial results, all float32: o (..., D), m (...), l (...); segments, if there are several, lead."""

    o: Tensor
    m: Tensor
    l: Tensor  # noqa: E741

    def segment(self, number: int) -> "Partial":
        """A view of one segment."""
        return Partial(self.o[number], self.m[number], self.l[number])


class Cache(NamedTuple):
    """Cached keys and values, each (pages, H, page size, D), of equal strides, with adjacent elements of a head.

    table: (B, P) int32, the pages of each sequence in order. A contiguous cache has one page for each sequence, and
    None means that the page of sequence b is b.
    """

    keys: Tensor
    values: Tensor
    table: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.keys.shape[2]

    @property
    def paged(self) -> bool:
        """Whether a sequence may have several pages."""
        return self.table is not None and self.table.shape[1] > 1


class Tree(NamedTuple):
    """Nodes behind the prefix of each sequence: their keys follow those of the prefix in the cache.

    masks: (B, N, W) int32 or int64; bit k of word w says whether a query sees node 32 w + k (64 w + k); bits of nodes
    that do not exist are ignored. nodes: (B,) int32, number of nodes in the cache. counts: (B,) int32, number of
    queries of each sequence, which are its last nodes; None if all nodes are queries. Outputs of the queries behind
    them are 0. depths: (B, nodes) int32, distance of each node from the first position behind the prefix; only needed
    with a window.
    """

    masks: Tensor
    nodes: Tensor
    counts: Tensor | None = None
    depths: Tensor | None = None

    @property
    def words(self) -> Tensor:
        """The masks in words of 32 bits."""
        return self.masks if self.masks.dtype == torch.int32 else self.masks.contiguous().view(torch.int32)


@dataclass(frozen=True)
class Scoring:
    """How scores are computed. scale: of the product; None is D ** -0.5.

    window: a query sees the keys of the last `window` positions, its own included; None is all. soft_cap: scores are
    soft_cap * tanh(score / soft_cap); None is no cap.
    """

    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap={self.soft_cap} must be positive, or None")


PLAIN = Scoring()


def check(queries: Tensor, cache: Cache, lengths: Tensor, scoring: Scoring, tree: Tree | None) -> None:
    """ValueError if the arguments of an attention do not fit together."""
    batch, width, heads, size = queries.shape
    pages, kv_heads, _, own = cache.keys.shape
    if cache.values.shape != cache.keys.shape:
        raise ValueError(f"values {tuple(cache.values.shape)} must have the shape of keys {tuple(cache.keys.shape)}")
    if own != size or heads % kv_heads:
        raise ValueError(
            f"queries of {heads} heads of size {size} do not fit keys of {kv_heads} heads of size {own}: sizes must be "
            "equal, and the number of query heads a multiple of the number of KV heads"
        )
    if cache.keys.stride() != cache.values.stride() or cache.keys.stride(3) != 1 or queries.stride(3) != 1:
        raise ValueError(
            "keys and values must have equal strides, and elements of a head, also of queries, be adjacent in memory; "
            f"got {cache.keys.stride()}, {cache.values.stride()} and queries {queries.stride()}"
        )
    if cache.table is None and pages < batch:
        raise ValueError(f"a cache of {pages} pages without a table is too small for {batch} sequences")
    counts = {"lengths": lengths}
    if cache.table is not None and (cache.table.dtype != torch.int32 or len(cache.table) != batch):
        raise ValueError(f"table must be int32 with {batch} rows, got {cache.table.dtype} {tuple(cache.table.shape)}")
    if tree is not None:
        counts |= {"nodes": tree.nodes} | ({} if tree.counts is None else {"counts": tree.counts})
        if tree.masks.shape[:2] != (batch, width) or tree.masks.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"masks must be ({batch}, {width}, words) of int32 or int64, got {tree.masks.dtype} "
                f"{tuple(tree.masks.shape)}"
            )
        if scoring.window is not None and (tree.depths is None or tree.depths.dtype != torch.int32):
            raise ValueError(f"depths must be int32 (B, nodes) with window={scoring.window}, got {tree.depths}")
    for name, tensor in counts.items():
        if tensor.dtype != torch.int32 or tensor.shape != (batch,):
            raise ValueError(f"{name} must be ({batch},) int32, got {tensor.dtype} {tuple(tensor.shape)}")
