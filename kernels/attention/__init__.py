"""Attention over cached keys: one token or the nodes of a tree per sequence, ragged lengths, shared prefixes.

All of it has one contract, see contract.py: a segment of keys gives a partial result (o, m, l), and one operation
merges those of several segments.
"""

import torch
from torch import Tensor

from hasten.kernels.attention import reference
from hasten.kernels.attention.contract import PLAIN, Cache, Partial, Scoring, Tree, check
from hasten.kernels.dispatch import use_triton

__all__ = [
    "Cache",
    "Partial",
    "Scoring",
    "Tree",
    "decode_attention",
    "merge",
    "partial_attention",
    "shared_prefix_attention",
    "tree_attention",
]


def decode_attention(
    queries: Tensor,
    cache: Cache,
    lengths: Tensor,
    scoring: Scoring = PLAIN,
    *,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention (B, N, H * G, D), in the dtype of queries, of queries that see all keys of their sequence.

    queries: (B, N, H * G, D), usually N = 1. lengths: (B,) int32, number of keys of each sequence, the query's own
    included. positions: (B, N) int32, for windows: position of each query, counted from the first key, lengths - 1 at
    least; None is lengths - 1. sinks: (H * G,) logits. ValueError if arguments do not fit together.
    """
    check(queries, cache, lengths, scoring, None)
    if use_triton(queries):
        # Imported here because importing triton takes seconds, and most processes have no GPU.
        from hasten.kernels.attention import launch

        return launch.attention(queries, cache, lengths, scoring, positions, None, sinks=sinks)
    return reference.attention(queries, cache, lengths, scoring, positions, None, sinks)


def tree_attention(
    queries: Tensor,
    cache: Cache,
    lengths: Tensor,
    tree: Tree,
    scoring: Scoring = PLAIN,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention (B, N, H * G, D) of the nodes of trees, in the dtype of queries.

    A node sees the whole prefix and the nodes of its mask. queries: (B, N, H * G, D). lengths: (B,) int32, keys of each
    prefix; those of its nodes follow in the cache. Rows behind the queries of a sequence are 0. sinks: (H * G,) logits.
    """
    check(queries, cache, lengths, scoring, tree)
    if use_triton(queries):
        from hasten.kernels.attention import launch

        return launch.attention(queries, cache, lengths, scoring, None, tree, sinks=sinks)
    return reference.attention(queries, cache, lengths, scoring, None, tree, sinks)


def partial_attention(
    queries: Tensor,
    cache: Cache,
    lengths: Tensor,
    scoring: Scoring = PLAIN,
    *,
    positions: Tensor | None = None,
    tree: Tree | None = None,
) -> Partial:
    """Partial result of a segment: o (B, N, H * G, D), m and l (B, N, H * G); arguments as of the functions above."""
    check(queries, cache, lengths, scoring, tree)
    if use_triton(queries):
        from hasten.kernels.attention import launch

        out = launch.empty_partials(1, queries).segment(0)
        launch.attention(queries, cache, lengths, scoring, positions, tree, out=out)
        return out
    return reference.partial_attention(queries, cache, lengths, scoring, positions, tree)


def merge(partials: Partial, *, sinks: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Attention output (..., H * G, D) of partial results o (S, ..., H * G, D), m and l (S, ..., H * G) of S segments.

    sinks: (H * G,) logits.
    """
    if use_triton(partials.o):
        from hasten.kernels.attention import launch

        return launch.merge(partials, sinks, dtype)
    return reference.merge(partials, sinks, dtype)


def shared_prefix_attention(
    queries: Tensor,
    prefix: Cache,
    prefix_lengths: Tensor,
    suffix: Cache,
    lengths: Tensor,
    scoring: Scoring = PLAIN,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention (B, N, H * G, D) of sequences that share prefixes, each of which is read once.

    Source: Juravsky et al. 2024, arXiv:2402.05099 (Hydragen): the queries of all sequences of a prefix are rows of one
    product. prefix: caches of A prefixes; the first B / A sequences have the first of them, and so on. prefix_lengths:
    (A,) int32. suffix, lengths: as in `decode_attention`, for the keys behind the prefix. ValueError if B is not a
    multiple of A.
    """
    batch, width, heads, size = queries.shape
    shared = len(prefix_lengths)
    if batch % shared:
        raise ValueError(f"{batch} sequences cannot have {shared} prefixes: each needs as many sequences as the others")
    together = queries.reshape(shared, batch // shared * width, heads, size)
    positions = None
    if scoring.window is not None:
        own = prefix_lengths[:, None] + lengths.view(shared, -1) - 1
        positions = own.repeat_interleave(width, 1)
    check(together, prefix, prefix_lengths, scoring, None)
    check(queries, suffix, lengths, scoring, None)
    if use_triton(queries):
        from hasten.kernels.attention import launch

        return launch.shared_prefix_attention(
            queries, together, prefix, prefix_lengths, suffix, lengths, scoring, positions, sinks
        )
    return reference.shared_prefix_attention(
        queries, together, prefix, prefix_lengths, suffix, lengths, scoring, positions, sinks
    )
