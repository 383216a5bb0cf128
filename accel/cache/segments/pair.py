"""Segments whose keys and values are stored by themselves, in the same form, with the positions of their tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from hasten.accel.cache.base import Rotation
from hasten.accel.cache.segments.base import Segment


class Vectors(Protocol):
    """Keys or values of T tokens and H heads in some form."""

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the form."""

    def dense(self, heads: int) -> Tensor:
        """The vectors (H, T, D)."""


V = TypeVar("V", bound=Vectors)


@dataclass(frozen=True)
class Pair(Segment, Generic[V]):
    """positions: (H, T) int32, of one row."""

    keys: V
    values: V
    positions: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.positions.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """Those of keys and values, and positions."""
        yield from self.keys.tensors()
        yield from self.values.tensors()
        yield self.positions

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (H, T, D)."""
        heads = len(self.positions)
        return self.keys.dense(heads), self.values.dense(heads), self.positions


@dataclass(frozen=True)
class UnrotatedPair(Pair[V]):
    """keys: without their rotary embedding, which rotary adds."""

    rotary: Rotation

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys with their rotary embedding, and values."""
        keys, values, positions = super().dense()
        return self.rotary(keys, positions, False), values, positions


def by_head(rows: Tensor, heads: int) -> Tensor:
    """Rows (T, H * D) of all heads as (H, T, D)."""
    return rows.unflatten(1, (heads, -1)).transpose(0, 1)
