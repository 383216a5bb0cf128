"""Vectors in a basis that the tokens share: a few numbers a token, as they are or in few bits.

Source: Wang et al. 2024, arXiv:2409.10593 (CSKV).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.segments.pair import by_head
from hasten.kernels.quantize_pack import Packed, quantize_pack, unpack_dequantize


@dataclass(frozen=True)
class Projected:
    """Vectors (T, H * D) as codes (T, R) times basis (R, H * D), whose rows are orthonormal."""

    codes: Tensor | Packed
    basis: Tensor

    @classmethod
    def of(cls, vectors: Tensor, basis: Tensor, bits: int | None, axis: str, group: int | None) -> "Projected":
        """Of vectors (T, H * D). bits: of a code, None keeps them as they are. axis, group: see quantize_pack."""
        codes = (vectors.float() @ basis.float().T).to(vectors.dtype)
        if bits is None:
            return cls(codes, basis)
        return cls(quantize_pack(codes, bits, axis, group), basis)

    def tensors(self) -> Iterator[Tensor]:
        """Codes and the basis."""
        if isinstance(self.codes, Packed):
            yield from (self.codes.words, self.codes.scale)
            if self.codes.offset is not None:
                yield self.codes.offset
        else:
            yield self.codes
        yield self.basis

    def dense(self, heads: int) -> Tensor:
        """Vectors (H, T, D)."""
        codes = unpack_dequantize(self.codes) if isinstance(self.codes, Packed) else self.codes
        return by_head((codes.float() @ self.basis.float()).to(codes.dtype), heads)
