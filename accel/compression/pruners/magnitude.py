"""Magnitude pruning: prune the weights closest to zero.

Source: Han et al. 2015, arXiv:1506.02626. The baseline every pruner here is compared with.
Departs from it: nothing is trained afterwards, and weights are compared within each row, not within the layer, because
a layer may be solved in pieces of rows.
"""

from dataclasses import dataclass

from torch import Tensor

from hasten.accel.compression.calibration.inputs import Inputs
from hasten.accel.compression.pruners.base import Pattern, PrunedWeight, ScoredPruner, prune_lowest
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost, rounding


@dataclass(frozen=True)
class Magnitude(ScoredPruner):
    """Pruner that needs no calibration data."""

    def prune(
        self, weight: Tensor, prepared: Inputs, pattern: Pattern, grid: Grid | None = None
    ) -> Result[PrunedWeight]:
        """Weight (R, C) without its smallest entries."""
        return prune_lowest(weight, weight.float().abs(), prepared, pattern, grid)

    def cost(self, layers: LayerStack, pattern: Pattern) -> MethodCost:
        """Every weight is compared and kept or not."""
        return MethodCost(rounding(layers))
