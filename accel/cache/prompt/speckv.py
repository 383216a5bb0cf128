"""SpecKV: tokens are kept by the attention of what a draft model expects behind the prompt.

Source: Galim et al. 2025, arXiv:2506.08373, and its code: the target runs prompt and draft, the importance of a token
for a KV head is the largest attention over the last queries of the prompt, those of the draft and the head's query
heads, smoothed over its neighbours, and the draft is dropped again.
Departs from it: the prompt's own attention is dense, and the method is also applied while decoding, without a draft.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.evict.base import Candidates, Evictor, pooled_before_window, window_shares
from hasten.accel.cache.prompt.base import Draft, Drafting, Prompt, Reading
from hasten.accel.cache.segments.base import attention_shares
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class SpecKV(Drafting, Evictor):
    """Evictor by a draft's attention. lookahead: most tokens of it. window, kernel: as of SnapKV."""

    selects: ClassVar[bool] = False

    lookahead: int = 128
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lookahead", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: 1 or more")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"cache.kernel={self.kernel} is wrong: expected an odd number")

    @property
    def query_window(self) -> int:
        """The window."""
        return self.window

    def read(self, prompt: Prompt, draft: Draft | None, budget: int | None) -> Reading:
        """The draft's most probable continuation, if tokens must be dropped at all."""
        assert draft is not None
        if budget is not None and prompt.length <= budget:
            return Reading()
        expected = draft.continuation(prompt.tokens, min(prompt.new, self.lookahead))
        return Reading(lookahead=[*prompt.tokens[prompt.length :], *expected])

    def score(self, tokens: Candidates) -> Tensor:
        """Largest attention, pooled; the last queries' own tokens come first."""
        attention = window_shares(tokens).amax((1, 2))
        if tokens.lookahead is not None:
            ahead, scoring = tokens.lookahead, tokens.place.scoring
            shares = attention_shares(ahead.queries, tokens.keys, scoring, ahead.denominators)
            if scoring.window is not None:
                shares *= ahead.positions[:, None] - tokens.positions[:, None, None] < scoring.window
            attention = torch.maximum(attention, shares.amax((1, 2)))
        return pooled_before_window(attention, tokens, self.kernel)
