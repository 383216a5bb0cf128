"""Segments of two precisions: some tokens of each head in more bits, the others in fewer.

Source: Yang et al. 2024, arXiv:2402.18096 (MiKV): every token's numbers have their own grid, and keys are balanced
before: channels with large queries are multiplied, so that rounding costs the scores less.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import Segment
from hasten.kernels.quantize_pack import Packed, quantize_pack, unpack_dequantize


@dataclass(frozen=True)
class PackedTokens:
    """Keys and values of T tokens of each of H heads: codes of (H * T, D) each, with a grid a token."""

    keys: Packed
    values: Packed
    heads: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, bits: int) -> "PackedTokens":
        """Of keys and values (H, T, D)."""
        packed_keys, packed_values = (quantize_pack(part.flatten(0, 1), bits, "token") for part in (keys, values))
        return cls(packed_keys, packed_values, len(keys))

    def tensors(self) -> Iterator[Tensor]:
        """Codes, scales and offsets."""
        for packed in (self.keys, self.values):
            yield from (packed.words, packed.scale)
            if packed.offset is not None:
                yield packed.offset

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values (H, T, D)."""
        keys, values = (unpack_dequantize(part).unflatten(0, (self.heads, -1)) for part in (self.keys, self.values))
        return keys, values


@dataclass(frozen=True)
class Mixed(Segment):
    """high, low: tokens in more and in fewer bits. balance: (H, 1, D), by which keys were multiplied before.

    positions: (H, T) int32, those of the high tokens first.
    """

    high: PackedTokens
    low: PackedTokens
    balance: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.positions.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """Those of both precisions, the balance and positions."""
        yield from self.high.tensors()
        yield from self.low.tensors()
        yield from (self.balance, self.positions)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys without their balance, values and positions."""
        keys, values = (torch.cat(part, 1) for part in zip(self.high.dense(), self.low.dense(), strict=True))
        return (keys.float() / self.balance).to(keys.dtype), values, self.positions

    @property
    def high_tokens(self) -> int:
        """Number of the tokens in more bits."""
        return self.high.keys.words.shape[0] // self.high.heads
