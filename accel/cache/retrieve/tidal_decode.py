"""TidalDecode: a few layers choose the tokens that the layers behind them read, too.

Source: Yang et al. 2024, arXiv:2410.05076, and its code: layers 0 and 1 read everything, layer 2 chooses by its exact
scores, later layers reuse its choice, and one layer in the middle chooses again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hasten.accel.cache.base import Place, Recent
from hasten.accel.cache.retrieve.base import Retriever
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.selected import Selected, best_of_heads, exact_scores
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Partial, Scoring

_CHOICE = "tidal_decode"


@dataclass(frozen=True)
class SharedChoice(Selected):
    """chooses: whether the layer chooses and reads everything. shared: of the layers of the sequence."""

    chooses: bool
    shared: dict[str, Any]

    def choose(self, queries: Tensor, scoring: Scoring) -> Tensor:
        """The choice of the last layer that chose, in the same pass."""
        chosen: Tensor = self.shared[_CHOICE]
        return chosen

    def attend(self, queries: Tensor, positions: Tensor, scoring: Scoring) -> Partial:
        """See Segment."""
        if not self.chooses or self.budget >= self.tokens:
            return super().attend(queries, positions, scoring)
        self.shared[_CHOICE] = best_of_heads(exact_scores(queries, self.keys, scoring), self.budget)
        return Dense.attend(self, queries, positions, scoring)


@dataclass(frozen=True)
class TidalDecode(Retriever):
    """Retriever whose layers share a choice.

    dense: first layers, which read everything. again: layer that chooses again; None is the middle one of the layers
    behind the first choice.
    """

    dense: int = 2
    again: int | None = None

    reads_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense < 0:
            raise UserError(f"cache.dense={self.dense} is out of range: 0 or more")

    def index(
        self, keys: Tensor, values: Tensor, positions: Tensor, before: Sequence[Segment], recent: Recent, place: Place
    ) -> Segment:
        """All tokens of the first layers; of the others, what the layer of the last choice chose."""
        assert place.budget is not None
        if place.layer < self.dense:
            return Dense(keys, values, positions)
        again = (self.dense + place.layers) // 2 if self.again is None else self.again
        chooses = place.layer in (self.dense, again)
        return SharedChoice(keys, values, positions, place.budget, chooses, place.shared)
