"""Attention over cached keys in torch, in float32, or in float64 where queries are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.attention.contract import WORD_BITS, Cache, Partial, Scoring, Tree


def partial_attention(
    queries: Tensor, cache: Cache, lengths: Tensor, scoring: Scoring, positions: Tensor | None, tree: Tree | None
) -> Partial:
    """See hasten.kernels.attention.partial_attention."""
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    keys, values = (part.to(wide) for part in _gathered(cache, len(queries), _longest(lengths, tree)))
    scale = queries.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = (_folded(queries, keys.shape[1]).to(wide) * scale) @ keys.mT
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    groups = queries.shape[2] // keys.shape[1]
    seen = visible(queries.shape[1], keys.shape[2], lengths, scoring.window, positions, tree).repeat(1, groups, 1)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    # A row without keys has no largest score. -inf minus -inf is nan.
    if not keys.shape[2]:
        largest = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    else:
        largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest.nan_to_num(neginf=0.0)).exp()
    parts = weights @ values, largest, weights.sum(-1, keepdim=True)
    o, m, total = (_unfolded(part, groups) for part in parts)
    return Partial(o, m[..., 0], total[..., 0])


def attention(
    queries: Tensor,
    cache: Cache,
    lengths: Tensor,
    scoring: Scoring,
    positions: Tensor | None,
    tree: Tree | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention (B, N, H * G, D) in the dtype of queries."""
    if scoring.soft_cap is not None or sinks is not None:
        partial = partial_attention(queries, cache, lengths, scoring, positions, tree)
        return merge(Partial(*(part[None] for part in partial)), sinks, queries.dtype)
    # torch's own attention does not hold all scores.
    keys, values = _gathered(cache, len(queries), _longest(lengths, tree))
    if not keys.shape[2]:
        return torch.zeros_like(queries)
    groups = queries.shape[2] // keys.shape[1]
    seen = visible(queries.shape[1], keys.shape[2], lengths, scoring.window, positions, tree)
    mask = None if bool(seen.all()) else seen.repeat(1, groups, 1)[:, None]
    out = F.scaled_dot_product_attention(_folded(queries, keys.shape[1]), keys, values, mask, scale=scoring.scale)
    # What torch returns for a query that sees no key depends on its version and on the implementation that it chooses.
    return _unfolded(out, groups).masked_fill(~seen.any(-1)[:, :, None, None], 0)


def shared_prefix_attention(
    queries: Tensor,
    together: Tensor,
    prefix: Cache,
    prefix_lengths: Tensor,
    suffix: Cache,
    lengths: Tensor,
    scoring: Scoring,
    positions: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """See hasten.kernels.attention.shared_prefix_attention. together (A, B / A * N, H * G, D): queries by prefix.

    positions: those of `together`, from the first key of its prefix; None without a window.
    """
    first = partial_attention(together, prefix, prefix_lengths, scoring, positions, None)
    rest = partial_attention(queries, suffix, lengths, scoring, None, None)
    both = Partial(*(torch.stack([a.reshape(b.shape), b]) for a, b in zip(first, rest, strict=True)))
    return merge(both, sinks, queries.dtype)


def merge(partials: Partial, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Attention output (..., D) of partial results with the segments in the leading dimension."""
    o, m, total = merge_partials(partials)
    if sinks is not None:
        sinks = sinks.to(m.dtype)
        largest = torch.maximum(m, sinks)
        kept = (m - largest).exp()
        o, total = o * kept[..., None], total * kept + (sinks - largest).exp()
    return (o / total.masked_fill(total == 0, 1)[..., None]).to(dtype)


def merge_partials(partials: Partial) -> Partial:
    """One partial result (..., D), (...), (...) of several, which are in the leading dimension."""
    m = partials.m.amax(0)
    kept = (partials.m - m.nan_to_num(neginf=0.0)).exp()
    return Partial((partials.o * kept[..., None]).sum(0), m, (partials.l * kept).sum(0))


def visible(
    width: int, total: int, lengths: Tensor, window: int | None, positions: Tensor | None, tree: Tree | None
) -> Tensor:
    """Which of a sequence's first `total` keys each query sees, (B, N, total) bool."""
    key = torch.arange(total, device=lengths.device)
    prefix = lengths[:, None].long()
    seen = (key < prefix)[:, None].expand(-1, width, -1)
    key_position = key.expand(len(lengths), -1)
    if tree is not None:
        node = key - prefix
        inside = (node >= 0) & (node < tree.nodes[:, None])
        if tree.words.shape[2]:
            word = (node // WORD_BITS).clamp(0, tree.words.shape[2] - 1)[:, None].expand(-1, width, -1)
            bit = (node % WORD_BITS).int()[:, None]
            seen = seen | ((tree.words.gather(2, word) >> bit) & 1).bool() & inside[:, None]
        counts = tree.nodes if tree.counts is None else tree.counts
        seen = seen & (torch.arange(width, device=lengths.device) < counts[:, None])[..., None]
        if window is not None:
            assert tree.depths is not None, "checked by the caller"
            if tree.depths.shape[1]:
                depth = tree.depths.gather(1, node.clamp(0, tree.depths.shape[1] - 1))
                key_position = torch.where(inside, prefix + depth, key)
            positions = query_positions(width, lengths, tree)
    if window is None:
        return seen
    if positions is None:
        positions = (lengths - 1)[:, None].expand(-1, width)
    return seen & (positions[..., None] - key_position[:, None] < window)


def query_positions(width: int, lengths: Tensor, tree: Tree) -> Tensor:
    """Position (B, N) of each query of a tree; those of padding are arbitrary."""
    assert tree.depths is not None, "checked by the caller"
    counts = tree.nodes if tree.counts is None else tree.counts
    if not tree.depths.shape[1]:
        return lengths[:, None].expand(-1, width)
    own = (tree.nodes - counts)[:, None] + torch.arange(width, device=lengths.device)
    return lengths[:, None] + tree.depths.gather(1, own.clamp(0, tree.depths.shape[1] - 1).long())


def _longest(lengths: Tensor, tree: Tree | None) -> int:
    return int((lengths if tree is None else lengths + tree.nodes).max())


def _gathered(cache: Cache, batch: int, total: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, total, D) of each sequence; a view if the cache has no table."""
    if cache.table is None:
        return cache.keys[:batch, :, :total], cache.values[:batch, :, :total]
    # Entries behind a sequence's pages are arbitrary.
    pages = cache.table[:, : -(-total // cache.page_size)].long().clamp(0, len(cache.keys) - 1)
    keys, values = (part[pages].transpose(1, 2).flatten(2, 3)[:, :, :total] for part in (cache.keys, cache.values))
    return keys, values


def _folded(queries: Tensor, heads: int) -> Tensor:
    """Queries (B, H, G * N, D): the G query heads of a KV head become rows."""
    return queries.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfolded(rows: Tensor, groups: int) -> Tensor:
    """(B, N, H * G, X) of (B, H, G * N, X)."""
    return rows.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
