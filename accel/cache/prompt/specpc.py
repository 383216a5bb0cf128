"""SpecPC: only those tokens of a prompt run to which a draft model attends.

Source: Galim et al. 2025, arXiv:2506.08373, and its code: attention of the draft's last queries, weighted from 0 to 1,
and of a token that it puts behind them; the largest over queries, heads and the layers behind the first ones; smoothed;
the best tokens with their neighbours, and the last tokens.
Departs from it: tokens keep their positions, and the layers begin at a quarter of the depth instead of the eighth.
Generated tokens are all kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.prompt.base import Draft, Drafting, Prompt, Reading
from hasten.accel.cache.segments.base import Segment
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class SpecPC(Drafting):
    """Compressor of prompts. window: last tokens, whose queries count and which are kept. steps: drafted tokens.

    kernel: tokens over which the largest attention counts. neighbours: tokens that are taken along with a good one.
    skipped: share of the draft's layers that do not count, the first ones.
    """

    window: int = 64
    steps: int = 1
    kernel: int = 64
    neighbours: int = 64
    skipped: float = 0.25

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("steps", 0), ("kernel", 1), ("neighbours", 0)):
            if getattr(self, name) < least:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: {least} or more")
        if not 0 <= self.skipped < 1:
            raise UserError(f"cache.skipped={self.skipped} is out of range: 0 to less than 1")

    def read(self, prompt: Prompt, draft: Draft | None, budget: int | None) -> Reading:
        """The `budget` tokens that run."""
        assert draft is not None
        assert budget is not None
        if prompt.length <= budget:
            return Reading()
        layers = draft.attention(prompt.tokens, self.window, self.steps)
        rows = torch.stack([self._importance(layer) for layer in layers[int(self.skipped * len(layers)) :]])
        return Reading(kept=self.choose(rows.amax(0)[: prompt.length], budget))

    def _importance(self, attention: Tensor) -> Tensor:
        """Largest weighted attention (T,) over heads and queries of (H * G, Q, T)."""
        ahead = torch.ones(self.steps, device=attention.device)
        own = torch.linspace(0, 1, attention.shape[1] - self.steps, device=attention.device)
        return (attention * torch.cat([own, ahead])[:, None]).amax((0, 1))

    def choose(self, importance: Tensor, budget: int) -> list[int]:
        """Ascending indices of `budget` tokens of importance (T,)."""
        count = len(importance)
        before = (self.kernel - 1) // 2
        padded = F.pad(importance, (before, self.kernel - 1 - before))
        pooled = F.max_pool1d(padded[None], self.kernel, 1)[0]
        # Nearest neighbours first, so that the budget cuts off the farthest ones.
        steps = (
            sorted(range(-((self.neighbours - 1) // 2), self.neighbours // 2 + 1), key=abs) if self.neighbours else [0]
        )
        kept = dict.fromkeys(range(max(0, count - min(self.window, budget)), count))
        for token in pooled.sort(descending=True, stable=True).indices.tolist():
            if len(kept) >= budget:
                break
            kept.update(dict.fromkeys(token + step for step in steps if 0 <= token + step < count))
        return sorted(list(kept)[:budget])

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """What ran is kept."""
        return None
