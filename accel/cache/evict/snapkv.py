"""SnapKV: the tokens to which the last queries attend, smoothed over their neighbours.

Source: Li et al. 2024, arXiv:2404.14469.
Departs from it: also applied while decoding, with the last queries of then.
"""

from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.evict.base import Candidates, Evictor, pooled_before_window, window_attention
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class SnapKV(Evictor):
    """Evictor by the attention of the last `window` queries. kernel: tokens over which the largest one counts, odd."""

    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise UserError(f"cache.window={self.window} is out of range: 1 or more")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"cache.kernel={self.kernel} is wrong: expected an odd number")

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def score(self, tokens: Candidates) -> Tensor:
        """Attention of the last queries, pooled; the queries' own tokens, which are the last ones, come first."""
        return pooled_before_window(window_attention(tokens), tokens, self.kernel)
