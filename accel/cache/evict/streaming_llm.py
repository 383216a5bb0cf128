"""StreamingLLM: the first tokens, which attention uses as sinks, and the last ones.

Source: Xiao et al. 2023, arXiv:2309.17453.
Departs from it: positions stay those of the text, so that a kept key need not be rotated again.
"""

from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.evict.base import Candidates, Evictor


@dataclass(frozen=True)
class StreamingLLM(Evictor):
    """Evictor of the oldest tokens behind the sinks."""

    def score(self, tokens: Candidates) -> Tensor:
        """The position."""
        return tokens.positions.float()
