"""APE: contexts that were encoded apart from each other, at the same positions, are read together.

Source: Yang et al. 2025, arXiv:2502.05431 (Adaptive Parallel Encoding): behind a shared prefix each context is encoded
as if it were the only one. A query reads all contexts at a temperature T below 1, their log-sum-exp is multiplied by
S * T, and merged with that of the prefix and of the tokens behind the contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from hasten.accel.cache.base import Kept, Place, Recent
from hasten.accel.cache.prompt.base import PromptMethod
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Partial, Scoring


@dataclass(frozen=True)
class Contexts(Dense):
    """Keys and values of all contexts."""

    temperature: float
    scale: float

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """See Segment; scores are divided by the temperature before, and the log-sum-exp multiplied after."""
        own = queries.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
        o, m, total = super().attend(queries, positions, replace(scoring, scale=own / self.temperature))
        weight = (m + total.log()) * (self.scale * self.temperature)
        # A partial result whose denominator is 1. A query that sees no context has the weight -inf, and o of 0.
        unseen = total == 0
        return Partial(o / total.masked_fill(unseen, 1)[..., None], weight, (~unseen).to(total.dtype))


@dataclass(frozen=True)
class APE(PromptMethod):
    """Method that reads contexts in parallel. temperature: T. scale: S."""

    temperature: float = 0.9
    scale: float = 0.9

    has_budget: ClassVar[bool] = False
    frees: ClassVar[bool] = False
    takes_contexts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if not getattr(self, name) > 0:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: above 0")

    def contexts(self, keys: Tensor, values: Tensor, positions: Tensor) -> Segment:
        """One segment."""
        return Contexts(keys, values, positions, self.temperature, self.scale)

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Everything is kept."""
        return None
