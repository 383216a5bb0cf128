"""PrefixKV: each layer holds the tokens that make up one and the same share of its attention.

Source: Wang et al. 2024, arXiv:2412.03409, and its code: of each layer, tokens are sorted by the attention that they
received, and one share p for all layers is found by bisection so that the least numbers of tokens with that share add
up to the budget. The attention of the layers' tokens is profiled on calibration text, and without calibrated statistics
on the prompt itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens, attention
from hasten.accel.cache.evict.base import Candidates, Evictor
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.sequence import QUERIES_AT_ONCE

_HALVINGS = 40
_BUDGETS = "prefixkv"
# Points of a profile.
_STEPS = 512


@dataclass(frozen=True)
class PrefixKV(Evictor, Calibrated):
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
            shared[_BUDGETS] = _shares(layers, mean)
        kept = []
        for (segments, recent, place), share in zip(layers, shared[_BUDGETS], strict=True):
            assert place.budget is not None
            own = replace(place, budget=max(1, round(share * place.budget)))
            kept.append(self.compress(segments, recent, own))
        return kept

    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """Share of the attention that the tokens with the most of it received, by their share of the sequence."""
        received = torch.zeros(len(tokens.positions), dtype=torch.float64, device=tokens.keys.device)
        for first in range(0, len(received), QUERIES_AT_ONCE):
            received += attention(tokens, first, min(len(received), first + QUERIES_AT_ONCE)).sum((0, 1, 2))
        shares = received.sort(descending=True).values.cumsum(0) / received.sum()
        # Between the numbers of whole tokens the share grows evenly.
        wanted = torch.arange(1, _STEPS + 1, device=shares.device).double() * len(shares) / _STEPS
        below = wanted.long().clamp(max=len(shares) - 1)
        reached = torch.cat([shares.new_zeros(1), shares])
        return {"share": torch.lerp(reached[below], reached[below + 1], wanted - below)}

    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """The mean share of attention (STEPS,) of each share of the tokens."""
        return [{"share": (own["share"] / own["share"][-1]).float()} for own in layers]


def _shares(layers: Sequence[tuple[Sequence[Segment], Recent, Place]], mean: int) -> list[float]:
    """Budgets of the layers, relative to their mean."""
    profiles = [place.statistics["share"] for _, _, place in layers if place.statistics is not None]
    if not profiles:
        counts = layer_counts([_by_token(recent) for _, recent, _ in layers], mean * len(layers))
        return [count / mean for count in counts]
    # Steps of the profile in place of tokens.
    steps = mean / layers[0][2].length * _STEPS
    received = [torch.diff(profile, prepend=profile.new_zeros(1)) for profile in profiles]
    return [count / steps for count in layer_counts(received, round(steps * len(layers)))]


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
