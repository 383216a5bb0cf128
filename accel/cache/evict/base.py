"""Base class of evictors: tokens with the lowest scores are dropped, in each head its own."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.accel.cache.base import CacheMethod, Kept, Lookahead, Place, Recent
from hasten.accel.cache.segments.base import Segment, scores
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.errors import UserError

POOLINGS = ("average", "max")
# Share of a large budget that may be held on top of it until the next compression.
_EXCESS = 1 / 16


@dataclass(frozen=True)
class Candidates:
    """Tokens of which some are dropped.

    keys, values: (H, T, D). positions: (H, T) int32. queries, attention, lookahead: see Recent.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor | None
    attention: Tensor | None
    place: Place
    lookahead: Lookahead | None = None

    def gathered(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of the tokens with indices kept (H, K)."""
        heads, count = self.positions.shape
        # Whole rows are copied, which `gather` does number by number.
        rows = (kept + count * torch.arange(heads, device=kept.device)[:, None]).flatten()
        keys, values = (
            part.flatten(0, 1).index_select(0, rows).unflatten(0, kept.shape) for part in (self.keys, self.values)
        )
        return keys, values, self.positions.gather(1, kept)


@dataclass(frozen=True)
class Evictor(CacheMethod):
    """Evictor of tokens by score. sinks: first tokens, recent: last tokens that are always kept."""

    sinks: int = 4
    recent: int = 16

    def __post_init__(self) -> None:
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: 0 or more")

    def interval_of(self, budget: int | None) -> int:
        """`interval`, doubled as often as it stays within a sixteenth of the budget.

        A compression reads and copies the whole budget: at a fixed interval its cost for each token would grow with it.
        """
        # Doubled, so that of the intervals of a model's layers each divides the larger ones.
        doublings = 0 if budget is None else (int(_EXCESS * budget) // self.interval).bit_length() - 1
        return self.interval << max(0, doublings)

    @abstractmethod
    def score(self, tokens: Candidates) -> Tensor:
        """Importance (H, T) float32 of each token."""

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """The `budget` tokens of each head with the highest scores, in their order, sinks and last tokens with them."""
        tokens = candidates(segments, recent, place)
        assert place.budget is not None
        if tokens.positions.shape[1] <= place.budget:
            return None
        kept = self.choose(tokens, place.budget)
        return Kept([Dense(*tokens.gathered(kept))], 0, kept)

    def choose(self, tokens: Candidates, budget: int) -> Tensor:
        """Ascending indices (H, budget) of the tokens that stay."""
        ranks, count = self.score(tokens).clone(), tokens.positions.shape[1]
        assert ranks.shape == tokens.positions.shape, (type(self).__name__, ranks.shape)
        sinks = tokens.positions < min(self.sinks, budget)
        # Where the budget is too small for both, there are fewer last tokens.
        recent_tokens = min(self.recent, budget - int(sinks[0].sum()))
        ranks.clamp_(max=torch.finfo(ranks.dtype).max).masked_fill_(sinks, torch.inf)
        ranks[:, count - recent_tokens :] = torch.inf
        least = ranks.kthvalue(count - budget + 1, dim=1, keepdim=True).values
        above, equal = ranks > least, ranks == least
        # Of equal scores the later token is kept.
        later = equal.flip(1).cumsum(1).flip(1) <= budget - above.sum(1, keepdim=True)
        return (above | (equal & later)).nonzero()[:, 1].view(len(ranks), budget)


def candidates(segments: Sequence[Segment], recent: Recent, place: Place) -> Candidates:
    """The tokens of all segments, and the dense ones behind them."""
    own = recent.keys, recent.values, recent.positions.expand(len(recent.keys), -1)
    parts = zip(*(segment.dense() for segment in segments), own, strict=True)
    keys, values, positions = (torch.cat(part, 1) for part in parts)
    return Candidates(keys, values, positions, recent.queries, recent.attention, place, recent.lookahead)


def window_attention(tokens: Candidates) -> Tensor:
    """Attention (H, T) float32 that the last queries give to each token, summed over them and over query heads."""
    return window_shares(tokens).sum((1, 2))


def window_shares(tokens: Candidates) -> Tensor:
    """Attention (H, G, W, T) float32 that each of the last queries gives to each token."""
    assert tokens.queries is not None
    width = len(tokens.queries)
    products = scores(tokens.queries, tokens.keys, tokens.place.scoring).unflatten(1, (-1, width))
    # The queries are of the last committed tokens, of which earlier compressions may have dropped some.
    own = tokens.positions[:, -1:] - torch.arange(width - 1, -1, -1, device=products.device)  # (H, W)
    # Positions ascend, so that tokens before the last `width` ones are seen by all.
    hidden = tokens.positions[:, None, -width:] > own[..., None]
    products[..., -width:].masked_fill_(hidden[:, None], -torch.inf)
    attention = products.softmax(-1)
    if tokens.positions.shape[1] > width:
        return attention
    # A query that sees no token that is left.
    return attention.nan_to_num(0.0)


def pooled_before_window(attention: Tensor, tokens: Candidates, kernel: int) -> Tensor:
    """Largest attention (H, T) over neighbours; the last queries' own tokens come first, and are no neighbours.

    attention: (H, T). kernel: number of neighbours, odd.
    """
    assert tokens.queries is not None
    return pooled(attention, tokens.positions > tokens.positions[:, -1:] - len(tokens.queries), kernel, "max")


def pooled(attention: Tensor, first: Tensor, kernel: int, pooling: str) -> Tensor:
    """Attention (H, T) pooled over neighbours; tokens of `first` (H, T) bool come first, and are no neighbours.

    kernel: number of neighbours, odd. pooling: one of POOLINGS.
    """
    if pooling == "max":
        largest = F.max_pool1d(attention.masked_fill(first, -torch.inf)[:, None], kernel, 1, kernel // 2)[:, 0]
        return largest.masked_fill(first, torch.inf)
    # Of the neighbours that there are: the outermost tokens are as good as others.
    sums, counts = (
        F.avg_pool1d(part[:, None], kernel, 1, kernel // 2)[:, 0]
        for part in (attention.masked_fill(first, 0.0), (~first).to(attention.dtype))
    )
    return (sums / counts).masked_fill(first, torch.inf)
