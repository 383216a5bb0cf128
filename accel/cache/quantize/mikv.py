"""MiKV: tokens that receive much attention are held in more bits, the others in few instead of being evicted.

Source: Yang et al. 2024, arXiv:2402.18096 (abstract and a summary; no code was found). Our reading: a token that is
held in few bits never returns to more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.evict.base import candidates
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.mixed import Mixed, PackedTokens
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS


@dataclass(frozen=True)
class MiKV(CacheMethod):
    """Quantizer of two precisions by summed attention.

    share: of the tokens that are held in high_bits; the others take low_bits. recent: last tokens that stay as they
    are. window: queries that the balance of channels is measured on.
    """

    share: float = 0.5
    high_bits: int = 8
    low_bits: int = 2
    recent: int = 32
    window: int = 64

    has_budget: ClassVar[bool] = False
    sums_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"cache.share={self.share} is out of range: 0 to 1")
        for name in ("high_bits", "low_bits"):
            if getattr(self, name) not in BITS:
                raise UserError(f"cache.{name}={getattr(self, name)} is none of {', '.join(map(str, BITS))}")
        if self.recent < 0 or self.window < 1:
            raise UserError(f"need cache.recent >= 0 and cache.window >= 1, got {self.recent} and {self.window}")

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """All tokens but the last ones in two precisions."""
        tokens = candidates(segments, recent, place)
        last = min(self.recent, recent.keys.shape[1])
        count = tokens.positions.shape[1] - last
        if count < 2:
            return None
        assert recent.attention is not None
        ranks = recent.attention[:, :count].clone()
        before = next((segment for segment in segments if isinstance(segment, Mixed)), None)
        if before is not None:
            ranks[:, before.high_tokens : before.tokens] = -torch.inf
        order = ranks.flip(1).sort(dim=1, descending=True, stable=True).indices
        order = count - 1 - order
        high = min(max(self.number(ranks), 1), count - 1)
        chosen, others = order[:, :high].sort(1).values, order[:, high:].sort(1).values
        balance = _balance(tokens.keys[:, :count], recent) if before is None else before.balance

        def packed(kept: Tensor, bits: int) -> PackedTokens:
            keys, values, _ = tokens.gathered(kept)
            return PackedTokens.of((keys.float() * balance).to(keys.dtype), values, bits)

        more, fewer = packed(chosen, self.high_bits), packed(others, self.low_bits)
        index = torch.cat([chosen, others], 1)
        segment = Mixed(more, fewer, balance, tokens.positions.gather(1, index))
        rest = torch.arange(count, count + last, device=index.device).expand(len(index), -1)
        return Kept([segment], last, torch.cat([index, rest], 1))

    def number(self, attention: Tensor) -> int:
        """Tokens of each head in more bits, from the attention (H, T); -inf for those that are in few bits already."""
        return round(self.share * attention.shape[1])


def _balance(keys: Tensor, recent: Recent) -> Tensor:
    """Factor (H, 1, D) float32 of each channel: the root of its largest query over its largest key."""
    assert recent.queries is not None
    queries = recent.queries.unflatten(1, (len(keys), -1)).float().abs().amax((0, 2))
    largest = keys.float().abs().amax(1)
    return (queries.clamp(min=1e-6) / largest.clamp(min=1e-6)).sqrt()[:, None]
