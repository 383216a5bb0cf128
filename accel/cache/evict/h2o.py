"""Heavy hitters: the tokens that received the most attention so far.

Source: Zhang et al. 2023, arXiv:2306.14048 (H2O).
Departs from it: the paper's half of the budget for recent tokens is the option `recent_share`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.evict.base import Candidates, Evictor
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class H2O(Evictor):
    """Evictor by attention summed over all queries. recent_share: of the budget, for the last tokens."""

    recent_share: float = 0.5

    sums_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_share < 1:
            raise UserError(f"cache.recent_share={self.recent_share} is out of range: 0 to less than 1")

    def score(self, tokens: Candidates) -> Tensor:
        """Summed attention; the last tokens come first."""
        assert tokens.attention is not None
        assert tokens.place.budget is not None
        scores = tokens.attention.clone()
        recent = int(tokens.place.budget * self.recent_share)
        if recent:
            scores[:, -recent:] = torch.inf
        return scores
