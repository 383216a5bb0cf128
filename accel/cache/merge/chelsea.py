"""Chelsea: in each chunk of tokens, the most similar pairs of keys are merged until the budget is met.

Source: Liu et al. 2025, arXiv:2506.11418 (abstract; no code was found): a chunk is split alternately into two sets,
each token of the first has one edge to the most similar one of the second, and the tokens on the strongest edges become
one cluster with the mean key and value. A score counts as often as its cluster has tokens, which is our choice: without
it a merged token weighs as much as any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.merged import Merged
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Chelsea(CacheMethod):
    """Merger of similar neighbours. chunk: tokens among which pairs are sought. sinks, recent: tokens left as they are.

    counts: whether a score counts as often as its cluster has tokens.
    """

    chunk: int = 64
    sinks: int = 4
    recent: int = 16
    counts: bool = True

    def __post_init__(self) -> None:
        if self.chunk < 2 or self.sinks < 0 or self.recent < 0:
            raise UserError(
                f"need cache.chunk >= 2, cache.sinks >= 0 and cache.recent >= 0, got {self.chunk}, {self.sinks} and "
                f"{self.recent}"
            )

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Clusters, as many as the budget allows, and the last tokens as they are."""
        assert place.budget is not None
        heads, dense = recent.keys.shape[:2]
        last = min(self.recent, dense, max(place.budget - 1, 0))
        own = slice(0, dense - last)
        counted = torch.ones(heads, dense - last, device=recent.keys.device)
        parts = [(*segment.dense(), _counts(segment)) for segment in segments]
        parts.append((recent.keys[:, own], recent.values[:, own], recent.positions[own].expand(heads, -1), counted))
        keys, values, positions, counts = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        while keys.shape[1] + last > place.budget:
            count = keys.shape[1]
            keys, values, positions, counts = self._round(keys, values, positions, counts, place.budget - last)
            if keys.shape[1] == count:
                break
        if not self.counts:
            counts = torch.ones_like(counts)
        return Kept([Merged(keys, values, positions, counts)], last)

    def _round(
        self, keys: Tensor, values: Tensor, positions: Tensor, counts: Tensor, budget: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Merge the strongest edges, down to `budget` tokens or by half at most."""
        # At least two tokens are left to be merged.
        first = min(self.sinks, budget - 1)
        count = keys.shape[1] - first
        a = torch.arange(first, first + count - count % 2, 2, device=keys.device)
        b = a + 1
        unit = F.normalize(keys.float(), dim=-1)
        similarity = unit[:, a] @ unit[:, b].mT  # (H, A, B)
        chunks = torch.arange(len(a), device=keys.device) // (self.chunk // 2)
        similarity = similarity.masked_fill(chunks[:, None] != chunks, -torch.inf)
        best, target = similarity.max(-1)
        number = min(keys.shape[1] - budget, len(a))
        if number <= 0:
            return keys, values, positions, counts
        edges = best.sort(dim=1, descending=True, stable=True).indices[:, :number]  # (H, number), in A
        source, goal = a[edges], b[target.gather(1, edges)]
        merged = []
        for part in (keys, values):
            weighted = part.float() * counts[..., None]
            index = goal[..., None].expand(-1, -1, part.shape[2])
            merged.append(weighted.scatter_add(1, index, weighted.gather(1, source[..., None].expand_as(index))))
        total = counts.scatter_add(1, goal, counts.gather(1, source))
        stay = torch.ones_like(counts, dtype=torch.bool).scatter_(1, source, False)
        kept = stay.nonzero()[:, 1].view(len(keys), -1)
        means = [(part / total[..., None]).gather(1, kept[..., None].expand(-1, -1, part.shape[2])) for part in merged]
        new_keys, new_values = (mean.to(part.dtype) for mean, part in zip(means, (keys, values), strict=True))
        return new_keys, new_values, positions.gather(1, kept), total.gather(1, kept)


def _counts(segment: Segment) -> Tensor:
    assert isinstance(segment, Merged)
    return segment.counts
