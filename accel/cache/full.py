"""Full: keeps everything. The baseline every method here is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment


@dataclass(frozen=True)
class Full(CacheMethod):
    """Method that leaves the cache as it is."""

    has_budget: ClassVar[bool] = False
    frees: ClassVar[bool] = False

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Nothing changes."""
        return None
