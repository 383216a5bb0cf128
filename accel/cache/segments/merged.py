"""Segments of merged tokens: a key and a value stand for several tokens, and their score counts as often."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.segments.base import Segment, partial_attention
from hasten.kernels.attention.contract import Partial, Scoring
from hasten.kernels.segmented_token import DenseOperands, Operands


@dataclass(frozen=True)
class Merged(Segment):
    """keys, values: (H, T, D). positions: (H, T) int32. counts: (H, T) float32, tokens that each stands for.

    A key for n tokens has the weight n exp(score), as n equal keys would have.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.keys.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """Keys, values, positions and counts."""
        yield from (self.keys, self.values, self.positions, self.counts)

    def operands(self) -> Operands | None:
        """Keys and values of each head, and the logarithms of the counts."""
        return DenseOperands(self.keys.unbind(), self.values.unbind(), self.counts.log())

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """See Segment; a window ends by the positions of the merged tokens."""
        seen = None if scoring.window is None else positions[:, None] - self.positions[:, None] < scoring.window
        return partial_attention(queries, self.keys, self.values, scoring, seen, self.counts.log())

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values without their counts."""
        return self.keys, self.values, self.positions
