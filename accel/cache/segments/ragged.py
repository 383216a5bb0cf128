"""Ragged segments: every head holds as many tokens as it was given."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import Segment, by_head, by_query, partial_attention
from hasten.kernels.attention.contract import Partial, Scoring
from hasten.kernels.segment_attention import segment_attention
from hasten.kernels.segmented_token import DenseOperands, Operands


@dataclass(frozen=True)
class Ragged(Segment):
    """keys, values: one (T_h, D) for each head h. positions: (T_h,) int32 each."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    positions: Sequence[Tensor]

    @property
    def tokens(self) -> int:
        """Those of the head with most."""
        return max(len(part) for part in self.positions)

    def tensors(self) -> Iterator[Tensor]:
        """Those of all heads."""
        yield from (*self.keys, *self.values, *self.positions)

    def operands(self) -> Operands | None:
        """Those of each head."""
        return DenseOperands(self.keys, self.values)

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """See Segment; head by head where a window cuts their tokens."""
        groups, parts = queries.shape[1] // len(self.keys), []
        if scoring.window is None:
            scale = queries.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
            folded = by_head(queries, len(self.keys))
            return by_query(segment_attention(folded, self.keys, self.values, scale, scoring.soft_cap), len(queries))
        for head, (keys, values, held) in enumerate(zip(self.keys, self.values, self.positions, strict=True)):
            own = queries[:, head * groups : (head + 1) * groups]
            seen = positions[:, None] - held < scoring.window
            parts.append(partial_attention(own, keys[None], values[None], scoring, seen))
        return Partial(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Not possible where heads differ; see `of_heads`."""
        lengths = {len(part) for part in self.positions}
        assert len(lengths) == 1, "heads hold different numbers of tokens"
        return torch.stack(list(self.keys)), torch.stack(list(self.values)), torch.stack(list(self.positions))
