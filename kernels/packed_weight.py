"""A weight of integer codes, packed as compressed-tensors' `pack-quantized` stores it.

The codes of a row are a stream of bits, least significant first, padded to whole 32-bit words: code c of a row starts
at bit c * bits, and may cross into the next word. A stored code is unsigned, also on symmetric grids, whose zero point
is the middle, 2**(bits - 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
# Codes that a conversion unpacks at a time, because it takes some 100 bytes for each.
CODES_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class PackedWeight:
    """Weight (R, C) as codes, scales and zero points: (code - zero_point) * scale.

    codes: int32 (R, ceil(C * bits / 32)). scale: (R, G), any float dtype; C / G adjacent columns share a scale, G = 1
    is one scale a row. zero_point: uint8 (R, G); None on symmetric grids. group_index: int32 (C,), the group of each
    column where activation order has permuted them; None if groups are adjacent columns.
    """

    codes: Tensor
    scale: Tensor
    columns: int
    bits: int
    zero_point: Tensor | None = None
    group_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} is not supported: use one of {', '.join(map(str, BITS))}")
        words = -(-self.columns * self.bits // 32)
        if self.codes.dtype != torch.int32 or self.codes.shape[1] != words:
            raise ValueError(
                f"codes of {self.columns} columns in {self.bits} bits must be int32 with {words} words a row, got "
                f"{self.codes.dtype} with {self.codes.shape[1]}"
            )
        if self.scale.ndim != 2 or len(self.scale) != len(self.codes):
            raise ValueError(f"scale must be ({len(self.codes)}, groups), got {tuple(self.scale.shape)}")
        # A kernel would read other memory.
        zero, index = self.zero_point, self.group_index
        if zero is not None and (zero.dtype != torch.uint8 or zero.shape != self.scale.shape):
            raise ValueError(
                f"zero_point must be uint8 {tuple(self.scale.shape)}, got {zero.dtype} {tuple(zero.shape)}"
            )
        if index is not None and (index.dtype != torch.int32 or index.shape != (self.columns,)):
            raise ValueError(f"group_index must be int32 ({self.columns},), got {index.dtype} {tuple(index.shape)}")
        if self.group_index is None and self.columns % self.scale.shape[1]:
            raise ValueError(f"{self.scale.shape[1]} groups do not divide {self.columns} columns")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return self.codes.shape[0], self.columns

    def to(self, device: torch.device) -> "PackedWeight":
        """The weight on a device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero_point=None if self.zero_point is None else self.zero_point.to(device),
            group_index=None if self.group_index is None else self.group_index.to(device),
        )

    def rows(self, index: Tensor) -> "PackedWeight":
        """The weight of these rows (N,) alone."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return replace(self, codes=self.codes[index], scale=self.scale[index], zero_point=zero_point)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (self.codes, self.scale, self.zero_point, self.group_index)
        return sum(part.nbytes for part in parts if part is not None)


def can_join(weights: Sequence[PackedWeight]) -> bool:
    """Whether weights differ in their rows alone, so that they are one weight."""
    first = weights[0]
    return all(
        (other.bits, other.columns, other.scale.shape[1]) == (first.bits, first.columns, first.scale.shape[1])
        and (other.zero_point is None) == (first.zero_point is None)
        and other.group_index is first.group_index is None
        for other in weights[1:]
    )


def join(weights: Sequence[PackedWeight]) -> PackedWeight:
    """The rows of weights that can be joined, in one weight."""
    if len(weights) == 1:
        return weights[0]
    codes, scale = (torch.cat([getattr(weight, name) for weight in weights]) for name in ("codes", "scale"))
    zero_points = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return replace(weights[0], codes=codes, scale=scale, zero_point=torch.cat(zero_points) if zero_points else None)


def widened(codes: Tensor, bits: int, columns: int, wider: int) -> Tensor:
    """Words of the same codes in more bits, around the middle of the wider grid."""
    shift = 2 ** (wider - 1) - 2 ** (bits - 1)
    step = max(1, CODES_AT_ONCE // columns)
    return torch.cat([pack_codes(unpack_codes(part, bits, columns).int() + shift, wider) for part in codes.split(step)])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Words int32 (R, ceil(C * bits / 32)) of unsigned codes (R, C)."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    if 8 % bits == 0:
        # No code crosses a byte, so that a few operations on bytes do.
        phases = 8 // bits
        whole = torch.nn.functional.pad(codes.to(torch.uint8), (0, 4 * words * phases - columns))
        # Codes may lie column by column.
        stream = whole[:, ::phases].clone(memory_format=torch.contiguous_format)
        for phase in range(1, phases):
            stream |= whole[:, phase::phases] << bits * phase
        return stream.view(torch.int32)
    position = torch.arange(bits, device=codes.device)
    stream = (codes[..., None].int() >> position & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, 32 * words - columns * bits)).view(rows, words, 32).long()
    packed = (stream << torch.arange(32, device=codes.device)).sum(-1)
    return torch.where(packed < 2**31, packed, packed - 2**32).int()


def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unsigned codes uint8 (R, C) of packed words (R, W)."""
    if 8 % bits == 0:
        stream = words.contiguous().view(torch.uint8)
        phases = [stream >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
        return torch.stack(phases, -1).flatten(1)[:, :columns]
    stream = (words[..., None] >> torch.arange(32, device=words.device) & 1).flatten(1)
    stream = stream[:, : columns * bits].unflatten(1, (columns, bits))
    return (stream << torch.arange(bits, device=words.device)).sum(-1).to(torch.uint8)
