"""Attention over one segment of a cache, and the merging of several, in torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels.attention import reference
from hasten.kernels.attention.contract import Partial


def segment_attention(
    queries: Tensor,
    keys: Sequence[Tensor] | Tensor,
    values: Sequence[Tensor] | Tensor,
    scale: float,
    cap: float | None,
    seen: Tensor | None,
    bias: Tensor | None,
) -> Partial:
    """See hasten.kernels.segment_attention.segment_attention."""
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        heads = zip(queries, keys, values, strict=True)
        parts = [segment_attention(q[None], k[None], v[None], scale, cap, None, None) for q, k, v in heads]
        return Partial(*(torch.cat(part) for part in zip(*parts, strict=True)))
    weights = (queries.float() * scale) @ keys.float().mT
    if cap is not None:
        weights = cap * torch.tanh(weights / cap)
    if bias is not None:
        weights += bias[:, None]
    if seen is not None:
        groups = weights.shape[1] // seen.shape[-2]
        weights = weights.masked_fill_(~seen.repeat(*(1,) * (seen.ndim - 2), groups, 1), -torch.inf)
    # A row without keys has no largest score. -inf minus -inf is nan.
    shape = weights.shape[:-1]
    largest = weights.amax(-1) if weights.shape[-1] else weights.new_full(shape, -torch.inf)
    weights = weights.sub_(largest.nan_to_num(neginf=0.0)[..., None]).exp_()
    return Partial(weights @ values.float(), largest, weights.sum(-1))


def merged_attention(partials: Sequence[Partial], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """See hasten.kernels.segment_attention.merged_attention."""
    merged = reference.merge_partials(Partial(*map(torch.stack, zip(*partials, strict=True))))
    output = reference.merge(Partial(*(part[None] for part in merged)), sinks, merged.o.dtype)
    denominators = merged.m + merged.l.log()
    return output, denominators if sinks is None else torch.logaddexp(denominators, sinks.to(denominators.dtype))
