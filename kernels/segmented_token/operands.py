"""What the kernel reads of a segment of a cache of H KV heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.kernels.quantize_pack import Packed


@dataclass(frozen=True)
class DenseOperands:
    """keys, values: (T_h, D) of each head. bias: (H, T), added to scores where heads have equal numbers; None: none."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    bias: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Those of the head with most."""
        return max(map(len, self.keys))

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (*self.keys, *self.values)
        if self.bias is not None:
            yield self.bias


@dataclass(frozen=True)
class PackedOperands:
    """keys: codes of (T, H * D) by channel. values: codes of (T * H, D) by token. heads: H."""

    keys: Packed
    values: Packed
    heads: int

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.keys.words)

    def tensors(self) -> Iterator[Tensor]:
        """Codes and grids."""
        for packed in (self.keys, self.values):
            yield from (part for part in (packed.words, packed.scale, packed.offset) if part is not None)


Operands = DenseOperands | PackedOperands
