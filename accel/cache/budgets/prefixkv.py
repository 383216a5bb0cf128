"""PrefixKV: each layer holds the tokens that make up one and the same share of its attention.

Source: Wang et al. 2024, arXiv:2412.03409, and its code: of each layer, tokens are sorted by the attention that they
received, and one share p for all layers is found by bisection so that the least numbers of tokens with that share add
up to the budget. Departs from it: the numbers come from the prompt itself, and not from other prompts before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.evict.base import Candidates, Evictor
from hasten.accel.cache.segments.base import Segment

_HALVINGS = 40
_BUDGETS = "prefixkv"


@dataclass(frozen=True)
class PrefixKV(Evictor):
    """Evictor by summed attention with a budget for each layer, which keeps its share when the sequence grows."""

    sums_attention: ClassVar[bool] = True
    joins_layers: ClassVar[bool] = True

    def score(self, tokens: Candidates) -> Tensor:
        """Summed attention."""
        assert tokens.attention is not None
        return tokens.attention

    def compress_layers(self, layers: Sequence[tuple[Sequence[Segment], Recent, Place]]) -> Sequence[Kept | None]:
        """With the layers' budgets, which are found once, at the end of the prompt."""
        shared = layers[0][2].shared
        if _BUDGETS not in shared:
            assert layers[0][2].budget is not None
            # Where the budget holds the whole prompt, every layer gets all of it.
            mean = min(layers[0][2].budget, layers[0][2].length)
            counts = layer_counts([_by_token(recent) for _, recent, _ in layers], mean * len(layers))
            shared[_BUDGETS] = [count / mean for count in counts]
        kept = []
        for (segments, recent, place), share in zip(layers, shared[_BUDGETS], strict=True):
            assert place.budget is not None
            own = replace(place, budget=max(1, round(share * place.budget)))
            kept.append(self.compress(segments, recent, own))
        return kept


def layer_counts(attention: Sequence[Tensor], budget: int) -> list[int]:
    """Tokens of each layer, of at most `budget` in all, for the attention (T,) that its tokens received."""
    shares = [part.sort(descending=True).values.double().cumsum(0) / part.double().sum() for part in attention]
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sum(_least(share, middle) for share in shares) <= budget:
            low = middle
        else:
            high = middle
    return [_least(share, low) for share in shares]


def _least(share: Tensor, wanted: float) -> int:
    """The least number of tokens whose attention is the wanted share."""
    return min(len(share), int(torch.searchsorted(share, wanted)) + 1)


def _by_token(recent: Recent) -> Tensor:
    assert recent.attention is not None
    return recent.attention.sum(0)
