"""Mustafar: of every key and value vector only the elements of largest magnitude are kept.

Source: Joo et al. 2025, arXiv:2505.22913. Departs from it: blocks of `block` tokens where its kernels want 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.quantize.base import CacheQuantizer
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.pair import Pair
from hasten.accel.cache.segments.sparse import SparseVectors
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Mustafar(CacheQuantizer):
    """Pruner of elements. key_sparsity, value_sparsity: fractions of a vector that become zero."""

    key_sparsity: float = 0.5
    value_sparsity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_sparsity", "value_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: 0 to less than 1")

    def pack(self, segments: Sequence[Segment], keys: Tensor, values: Tensor, positions: Tensor) -> list[Segment]:
        """A segment more."""
        shares = (keys, self.key_sparsity), (values, self.value_sparsity)
        kept = (SparseVectors.of(part, max(1, round((1 - share) * part.shape[-1]))) for part, share in shares)
        sparse_keys, sparse_values = kept
        return [*segments, Pair(sparse_keys, sparse_values, positions[:1].clone().expand(len(keys), -1))]
