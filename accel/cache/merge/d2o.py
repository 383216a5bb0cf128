"""D2O: evicted tokens are merged into the most similar kept one, or dropped where none is similar.

Source: Wan et al. 2024, arXiv:2406.13035, and its code for the weights and the threshold.
Departs from it: budgets of layers come from `cache_budget` and not from the variance of attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.evict.base import Candidates, Evictor, candidates
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class D2O(Evictor):
    """Evictor by summed attention that merges by cosine similarity of keys.

    smoothing: weight of the newest mean similarity in the running threshold below which a token is dropped.
    """

    smoothing: float = 0.5

    sums_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.smoothing <= 1:
            raise UserError(f"cache.smoothing={self.smoothing} is out of range: above 0, at most 1")

    def score(self, tokens: Candidates) -> Tensor:
        """Summed attention."""
        assert tokens.attention is not None
        return tokens.attention

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Kept tokens, with the evicted ones merged into them; the memory is the threshold (H,)."""
        assert place.budget is not None
        tokens = candidates(segments, recent, place)
        count = tokens.positions.shape[1]
        if count <= place.budget:
            return None
        kept = self.choose(tokens, place.budget)
        evicted = others(kept, count)
        keys, values, positions = tokens.gathered(kept)
        old_keys, old_values, _ = tokens.gathered(evicted)
        similarity = F.normalize(old_keys.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).mT  # (H, E, K)
        best, target = similarity.max(-1)
        mean = best.mean(1)
        threshold = mean if recent.memory is None else torch.lerp(recent.memory, mean, self.smoothing)
        weight = torch.where(best >= threshold[:, None], best, 0.0).clamp(min=0)
        keys, values = (
            weighted_mean(new, old, weight, target) for new, old in ((keys, old_keys), (values, old_values))
        )
        return Kept([Dense(keys, values, positions)], 0, kept, threshold)


def others(kept: Tensor, count: int) -> Tensor:
    """Ascending indices (H, count - K) of the tokens that are not among kept (H, K)."""
    free = torch.ones(len(kept), count, dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
    return free.nonzero()[:, 1].view(len(kept), -1)


def weighted_mean(new: Tensor, old: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Kept vectors (H, K, D), each the mean of itself, with weight 1, and the old ones (H, E, D) merged into it.

    weight, target: (H, E), of each old vector, and the kept one that it goes to.
    """
    total = torch.ones(new.shape[:2], device=new.device).scatter_add_(1, target, weight)
    index = target[..., None].expand(-1, -1, new.shape[2])
    summed = new.float().scatter_add(1, index, old.float() * weight[..., None])
    return (summed / total[..., None]).to(new.dtype)
