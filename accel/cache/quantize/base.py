"""Base class of methods that store the older tokens of a cache in fewer bits."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class CacheQuantizer(CacheMethod):
    """Quantizer of blocks of tokens. residual: last tokens that stay as they are. block: tokens packed at a time."""

    residual: int = 32
    block: int = 32

    has_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.residual < 0 or self.block < 1:
            raise UserError(f"need cache.residual >= 0 and cache.block >= 1, got {self.residual} and {self.block}")

    @abstractmethod
    def pack(self, segments: Sequence[Segment], keys: Tensor, values: Tensor, positions: Tensor) -> list[Segment]:
        """The segments followed by tokens (H, T, D) at positions (H, T), T a multiple of block."""

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Whole blocks of the oldest dense tokens are packed; no token is ever packed twice."""
        heads, count = recent.keys.shape[:2]
        packed = (count - self.residual) // self.block * self.block
        if packed < self.block:
            return None
        positions = recent.positions[:packed].expand(heads, -1)
        made = self.pack(segments, recent.keys[:, :packed], recent.values[:, :packed], positions)
        return Kept(made, count - packed)
