"""LoopServe's progressive selection: every so many generated tokens, those that the last outputs attended to are read.

Source: Li et al. 2025, arXiv:2507.13681 (abstract; no code was found). What is left out: its sparse prefill.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.base import Place, Recent
from hasten.accel.cache.evict.base import Candidates, window_attention
from hasten.accel.cache.retrieve.base import Retriever
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.selected import Selected
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Scoring


@dataclass(frozen=True)
class FixedChoice(Selected):
    """chosen: (H, budget) indices, the same for all queries."""

    chosen: Tensor

    def choose(self, queries: Tensor, scoring: Scoring) -> Tensor:
        """The tokens that were chosen last."""
        return self.chosen[:, None].expand(-1, len(queries), -1)


@dataclass(frozen=True)
class LoopServe(Retriever):
    """Retriever that chooses every `every` generated tokens by the attention of as many last queries."""

    every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"cache.every={self.every} is out of range: 1 or more")

    @property
    def interval(self) -> int:
        """Tokens between two choices."""
        return self.every

    @property
    def query_window(self) -> int:
        """Queries that choose."""
        return self.every

    def index(
        self, keys: Tensor, values: Tensor, positions: Tensor, before: Sequence[Segment], recent: Recent, place: Place
    ) -> Segment:
        """All tokens, with a new choice."""
        assert place.budget is not None
        attention = window_attention(Candidates(keys, values, positions, recent.queries, None, place))
        order = attention.flip(1).sort(dim=1, descending=True, stable=True).indices
        chosen = (attention.shape[1] - 1 - order[:, : place.budget]).sort(1).values
        return FixedChoice(keys, values, positions, place.budget, chosen)
