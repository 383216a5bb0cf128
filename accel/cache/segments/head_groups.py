"""Segments of which some heads are held in one form, and others in another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.base import Segment
from hasten.kernels.attention.contract import Partial, Scoring


@dataclass(frozen=True)
class HeadGroups(Segment):
    """heads: (K,) indices of the KV heads of each part; each head is in one of them. parts: their tokens."""

    heads: Sequence[Tensor]
    parts: Sequence[Segment]

    @property
    def tokens(self) -> int:
        """Those of the part with most."""
        return max(part.tokens for part in self.parts)

    def tensors(self) -> Iterator[Tensor]:
        """Those of all parts, and which heads are theirs."""
        yield from self.heads
        for part in self.parts:
            yield from part.tensors()

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """See Segment; part by part."""
        whole = torch.cat(list(self.heads))
        by_head = queries.unflatten(1, (len(whole), -1))  # (W, H, G, D)
        found = [
            part.attend(by_head[:, heads].flatten(1, 2), positions, scoring)
            for heads, part in zip(self.heads, self.parts, strict=True)
        ]
        place = whole.argsort()
        o, m, total = (
            torch.cat(values, 1).unflatten(1, (len(whole), -1))[:, place] for values in zip(*found, strict=True)
        )
        return Partial(o.flatten(1, 2), m.flatten(1, 2), total.flatten(1, 2))

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Not possible where heads differ; see `of_heads`."""
        raise AssertionError("heads hold different tokens")

    def of_heads(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of the part of these heads."""
        (part,) = (part for own, part in zip(self.heads, self.parts, strict=True) if torch.equal(own, heads))
        return part.dense()
