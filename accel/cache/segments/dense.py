"""Dense segments: keys and values as the model computed them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.segments.base import Segment
from hasten.kernels.segmented_token import DenseOperands, Operands


@dataclass(frozen=True)
class Dense(Segment):
    """keys, values: (H, T, D). positions: (H, T) int32, since each head may keep other tokens."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.keys.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """Keys, values and positions."""
        yield from (self.keys, self.values, self.positions)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Itself."""
        return self.keys, self.values, self.positions

    def operands(self) -> Operands | None:
        """Keys and values of each head."""
        return DenseOperands(self.keys.unbind(), self.values.unbind())
