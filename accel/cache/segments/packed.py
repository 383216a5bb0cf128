"""Segments of packed integers: keys in groups of tokens of a channel, values in groups of channels of a token.

Source: Liu et al. 2024, arXiv:2402.02750 (KIVI): outliers of keys lie in few channels, those of values anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import Segment, by_head, by_query
from hasten.kernels.attention.contract import Partial, Scoring
from hasten.kernels.packed_attention import is_faster, packed_attention
from hasten.kernels.quantize_pack import Packed, quantize_pack, unpack_dequantize
from hasten.kernels.segmented_token import Operands, PackedOperands


@dataclass(frozen=True)
class PackedSegment(Segment):
    """keys, values: codes of (T, H * D) and of (T * H, D). heads: H. positions: T, of all heads; see `_held`."""

    keys: Packed
    values: Packed
    heads: int
    positions: range | Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor, bits: int, group_size: int) -> "PackedSegment":
        """The segment of keys and values (H, T, D), T a multiple of group_size; all heads hold the same tokens."""
        heads, _, size = keys.shape
        width = size if size % 32 else min(size, 64)
        return cls(
            quantize_pack(keys.transpose(0, 1).flatten(1), bits, "channel", group_size),
            quantize_pack(values.transpose(0, 1).flatten(0, 1), bits, "token", width),
            heads,
            _held(positions[0]),
        )

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.positions)

    def tensors(self) -> Iterator[Tensor]:
        """Codes, scales, offsets, and positions that are no range."""
        for packed in (self.keys, self.values):
            yield from (packed.words, packed.scale)
            if packed.offset is not None:
                yield packed.offset
        if isinstance(self.positions, Tensor):
            yield self.positions

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Dequantized keys and values."""
        keys = unpack_dequantize(self.keys).unflatten(1, (self.heads, -1)).transpose(0, 1)
        values = unpack_dequantize(self.values).unflatten(0, (-1, self.heads)).transpose(0, 1)
        return keys, values, _tensor(self.positions, values.device).expand(self.heads, -1)

    def operands(self) -> Operands | None:
        """The codes."""
        return PackedOperands(self.keys, self.values, self.heads)

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """See Segment; from the codes themselves where there is a kernel, and no window that cuts them."""
        if scoring.window is not None or not is_faster(self.keys, self.heads):
            return super().attend(queries, positions, scoring)
        scale = queries.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
        folded = by_head(queries, self.heads).float()
        return by_query(packed_attention(folded, self.keys, self.values, scale, scoring.soft_cap), len(queries))

    def extended(self, other: "PackedSegment") -> "PackedSegment":
        """A segment of these tokens and of another's, of the same bits and groups; no code is computed again."""
        device = self.keys.words.device
        positions = torch.cat([_tensor(part.positions, device) for part in (self, other)])
        keys, values = _joined(self.keys, other.keys), _joined(self.values, other.values)
        return PackedSegment(keys, values, self.heads, _held(positions))


def _held(positions: Tensor) -> range | Tensor:
    """Positions (T,) as a range if they follow each other, as a copy otherwise: a range takes no memory."""
    if bool((positions.diff() == 1).all()):
        return range(int(positions[0]), int(positions[0]) + len(positions))
    return positions.int().clone()


def _tensor(positions: range | Tensor, device: torch.device) -> Tensor:
    """Positions (T,) int32."""
    if isinstance(positions, Tensor):
        return positions
    return torch.arange(positions.start, positions.stop, dtype=torch.int32, device=device)


def _joined(first: Packed, second: Packed) -> Packed:
    """Rows of both; groups of rows and rows of groups are both stacked along the first dimension."""
    words, scale = (torch.cat([getattr(part, name) for part in (first, second)]) for name in ("words", "scale"))
    offset = None
    if first.offset is not None and second.offset is not None:
        offset = torch.cat([first.offset, second.offset])
    return replace(first, words=words, scale=scale, offset=offset)
