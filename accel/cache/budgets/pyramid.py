"""Pyramid: layers near the input hold more tokens than those near the output.

Source: Cai et al. 2024, arXiv:2406.02069 (PyramidKV): budgets fall linearly with the layer, from 2 B - B / beta down to
B / beta, around the mean B; tokens are chosen as SnapKV does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.evict.snapkv import SnapKV
from hasten.accel.cache.segments.base import Segment
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Pyramid(SnapKV):
    """SnapKV with budgets that fall with the layer. beta: the last layer has the mean budget divided by it."""

    beta: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise UserError(f"cache.beta={self.beta} is out of range: 1 or more")

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """With the budget of the layer."""
        assert place.budget is not None
        return super().compress(segments, recent, replace(place, budget=self.budget_of(place)))

    def budget_of(self, place: Place) -> int:
        """Tokens of a layer; those of all layers add up to the mean times their number, but for rounding."""
        assert place.budget is not None
        least = place.budget / self.beta
        depth = place.layer / max(1, place.layers - 1)
        return max(1, round(2 * place.budget - least - 2 * depth * (place.budget - least)))
