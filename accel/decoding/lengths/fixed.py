"""Fixed draft length: the same number of tokens for every pass.

Source: Leviathan et al. 2023, arXiv:2211.17192, where it is γ.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hasten.accel.decoding.lengths.base import DraftLength, LengthController
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Fixed(DraftLength, LengthController):
    """Drafts `tokens` tokens for every pass. It has no state, so it is its own controller."""

    tokens: int = 8

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UserError(f"tokens={self.tokens} is wrong: expected 0 or more")

    @property
    def max_nodes(self) -> int:  # type: ignore[override]
        """Equal to `tokens`."""
        return self.tokens

    def max_tokens(self, limit: int) -> int:
        """Equal to `tokens`; the limit does not apply."""
        return self.tokens

    def start(self, measure_costs: Callable[[], PassCosts], limit: int) -> LengthController:
        """The object itself."""
        return self

    def budget(self, sequences: int) -> int:
        """Equal to `tokens`."""
        return self.tokens
