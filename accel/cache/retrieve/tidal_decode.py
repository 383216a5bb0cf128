"""TidalDecode: a few layers choose the tokens that the layers behind them read, too.

Source: Yang et al. 2024, arXiv:2410.05076, and its code: layers 0 and 1 read everything, layer 2 chooses by its exact
scores, later layers reuse its choice, and one layer behind it chooses again. Which one is calibrated for every model:
departing from the paper, which tries them on a task, it is the layer with which all layers read the largest share of
their attention. Without calibrated statistics it is the one in the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import Place, Recent
from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens, attention
from hasten.accel.cache.retrieve.base import Retriever
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.selected import Selected, best_of_heads, exact_scores
from hasten.accel.errors import UserError
from hasten.kernels.attention.contract import Partial, Scoring

_CHOICE = "tidal_decode"
# Last queries of a calibration sequence whose choices are compared.
_QUERIES = 64


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
class TidalDecode(Retriever, Calibrated):
    """Retriever whose layers share a choice.

    dense: first layers, which read everything. again: layer that chooses again; None is the calibrated one, else the
    middle one of the layers behind the first choice. read: share of the tokens that is read in the calibration.
    """

    dense: int = 2
    again: int | None = None
    read: float = 0.125

    calibrated_by: ClassVar[tuple[str, ...]] = ("recent", "dense", "read")

    reads_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense < 0:
            raise UserError(f"cache.dense={self.dense} is out of range: 0 or more")
        if not 0 < self.read <= 1:
            raise UserError(f"cache.read={self.read} is out of range: above 0, at most 1")

    def index(
        self, keys: Tensor, values: Tensor, positions: Tensor, before: Sequence[Segment], recent: Recent, place: Place
    ) -> Segment:
        """All tokens of the first layers; of the others, what the layer of the last choice chose."""
        assert place.budget is not None
        if place.layer < self.dense:
            return Dense(keys, values, positions)
        chooses = place.layer in (self.dense, self._again(place))
        return SharedChoice(keys, values, positions, place.budget, chooses, place.shared)

    def _again(self, place: Place) -> int:
        if self.again is not None:
            return self.again
        return (self.dense + place.layers) // 2 if place.statistics is None else int(place.statistics["again"])

    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """Share of the attention of the last queries that is read with what each earlier layer chose, (layers,)."""
        place, count = tokens.place, len(tokens.positions)
        recovered = torch.zeros(place.layers, dtype=torch.float64, device=tokens.keys.device)
        if place.layer >= self.dense:
            first = count - min(count, _QUERIES)
            shares = attention(tokens, first, count).mean(1)  # (H, W, T)
            # The last tokens are always read.
            older = shares.masked_fill_(tokens.positions[first:, None] - tokens.positions < self.recent, 0.0)
            chosen: list[Tensor] = place.shared.setdefault(_CHOICE, [])
            chosen.append(older.topk(max(1, round(self.read * count)), -1).indices)
            for number, index in enumerate(chosen):
                recovered[self.dense + number] = 1 - (older.sum(2) - older.gather(2, index).sum(2)).double().mean()
            # A layer that chooses reads everything.
            recovered[place.layer] = 1.0
        return {"recovered": recovered}

    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """The layer that chooses again."""
        recovered = torch.stack([own["recovered"] for own in layers])  # (layers, chooser)
        first = min(self.dense, len(layers) - 1)
        # Layers before the second choice read the first one. Without one that helps, the first layer stands for none.
        totals = [
            float(recovered[first:again, first].sum() + recovered[again:, again].sum())
            for again in range(first, len(layers))
        ]
        best = first + max(range(len(totals)), key=totals.__getitem__)
        return [{"again": torch.tensor(best)} for _ in layers]
