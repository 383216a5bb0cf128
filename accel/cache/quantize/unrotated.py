"""Base class of methods that store older keys without their rotary embedding, and the first tokens as they are."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic

from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.pair import UnrotatedPair, V
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class UnrotatedQuantizer(CacheMethod, Generic[V]):
    """Quantizer of blocks of tokens.

    sinks: first tokens that stay as they are. residual: last ones. block: tokens packed at a time.
    """

    sinks: int = 1
    residual: int = 32
    block: int = 32

    has_budget: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.sinks, self.residual) < 0 or self.block < 1:
            raise UserError(
                "need cache.sinks >= 0, cache.residual >= 0 and cache.block >= 1, got "
                f"{self.sinks}, {self.residual} and {self.block}"
            )

    @abstractmethod
    def quantize(
        self, keys: Tensor, values: Tensor, before: UnrotatedPair[V] | None, statistics: Mapping[str, Tensor] | None
    ) -> tuple[V, V]:
        """Stored keys and values, of unrotated keys and of values (H, T, D). before: the sequence's first tokens so.

        statistics: see Place.
        """

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Whole blocks of the oldest dense tokens are packed behind the sinks; no token is packed twice."""
        heads, count = recent.keys.shape[:2]
        sinks = 0 if segments else min(self.sinks, count)
        packed = (count - self.residual - sinks) // self.block * self.block
        if packed < self.block:
            return None
        assert place.rotary is not None
        made, own = list(segments), slice(sinks, sinks + packed)
        positions = recent.positions.expand(heads, -1)
        if sinks:
            first = (part[:, :sinks].clone() for part in (recent.keys, recent.values, positions))
            made.append(Dense(*first))
        before = next((segment for segment in segments if isinstance(segment, UnrotatedPair)), None)
        unrotated = place.rotary(recent.keys[:, own], positions[:, own], True)
        keys, values = self.quantize(unrotated, recent.values[:, own], before, place.statistics)
        made.append(UnrotatedPair(keys, values, recent.positions[own].clone().expand(heads, -1), place.rotary))
        return Kept(made, count - sinks - packed)
