"""SnapKV: the tokens to which the last queries attend, smoothed over their neighbours.

Source: Li et al. 2024, arXiv:2404.14469; window, kernel and pooling are the defaults of its code's class.
Its heads have keys of their own; of several query heads that share a KV head the largest attention counts here.
Departs from it: also applied while decoding, with the queries since the last time, `window` of them at most. The
prompt's are dropped: where three query heads share a KV head, 64 queries take as many bytes as 96 tokens. Of a small
budget the window's own tokens get no more than a quarter in any case.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.accel.cache.evict.base import POOLINGS, Candidates, Evictor, pooled, window_shares
from hasten.accel.errors import UserError

# Share of the budget that the window's own tokens get whatever attention they receive.
_OWN_SHARE = 1 / 4


@dataclass(frozen=True)
class SnapKV(Evictor):
    """Evictor by the attention of the last `window` queries.

    kernel: tokens over which it is pooled, odd. pooling: average, or max: the largest one.
    """

    window: int = 64
    kernel: int = 5
    pooling: str = "average"

    forgets_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise UserError(f"cache.window={self.window} is out of range: 1 or more")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"cache.kernel={self.kernel} is wrong: expected an odd number")
        if self.pooling not in POOLINGS:
            raise UserError(f"cache.pooling={self.pooling} is none of {', '.join(POOLINGS)}")

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def score(self, tokens: Candidates) -> Tensor:
        """Mean attention of the last queries, the largest of the query heads, pooled.

        The window's own tokens come first, up to a share of the budget.
        """
        assert tokens.queries is not None
        assert tokens.place.budget is not None
        width, last = len(tokens.queries), tokens.positions[:, -1:]
        # A token that one of the query heads needs stays, whatever the others need.
        sums = window_shares(tokens).sum(2).amax(1)
        # Of the queries that see the token: the window's own tokens are seen by those behind them alone.
        attention = sums / (last - tokens.positions + 1).clamp(max=width)
        first = tokens.positions > last - min(width, int(_OWN_SHARE * tokens.place.budget))
        return pooled(attention, first, self.kernel, self.pooling)
