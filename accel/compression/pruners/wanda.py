"""Wanda: the weights go that add least to the output, each for itself.

Source: Sun et al. 2023, arXiv:2306.11695: |w_ij| times the root mean square of input j, compared within each row.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.accel.compression.pruners.base import Inputs, Pattern, PrunedWeight, ScoredPruner, prune_lowest
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.compression.result import Result


@dataclass(frozen=True)
class Wanda(ScoredPruner):
    """Pruner by weight and input norm; the weights that are kept stay as they are."""

    needs_hessian: ClassVar[bool] = True

    def prune(
        self, weight: Tensor, prepared: Inputs, pattern: Pattern, grid: Grid | None = None
    ) -> Result[PrunedWeight]:
        """Weight (R, C) without the entries of the lowest product."""
        score = weight.float().abs()
        if prepared.hessian is not None:
            score.mul_(prepared.hessian.diagonal().sqrt())
        return prune_lowest(weight, score, prepared, pattern, grid)
