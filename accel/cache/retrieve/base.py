"""Base class of methods that hold all tokens and read the `budget` of each head that a query needs most."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.evict.base import candidates
from hasten.accel.cache.segments.base import Segment
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Retriever(CacheMethod):
    """Retriever of tokens. recent: last tokens, which every query reads besides the budget."""

    recent: int = 32

    frees: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.recent < 0:
            raise UserError(f"cache.recent={self.recent} is out of range: 0 or more")

    @abstractmethod
    def index(
        self, keys: Tensor, values: Tensor, positions: Tensor, before: Sequence[Segment], recent: Recent, place: Place
    ) -> Segment:
        """The segment of all tokens but the last ones; keys and values (H, T, D), positions (H, T)."""

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """One segment of all tokens but the last ones."""
        last = min(self.recent, recent.keys.shape[1])
        tokens = candidates(segments, recent, place)
        count = tokens.positions.shape[1] - last
        if count < 1:
            return None
        keys, values, positions = (part[:, :count].clone() for part in (tokens.keys, tokens.values, tokens.positions))
        return Kept([self.index(keys, values, positions, segments, recent, place)], last)
