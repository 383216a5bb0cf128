"""Wanda: prune the weights that, each taken alone, add least to the output.

Source: Sun et al. 2023, arXiv:2306.11695: |w_ij| times the root mean square of input j, compared within each row.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.accel.compression.calibration.inputs import Inputs
from hasten.accel.compression.calibration.slabs import SOLVE_BYTES
from hasten.accel.compression.pruners.base import Pattern, PrunedWeight, ScoredPruner, prune_lowest
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.compression.result import Result
from hasten.accel.costs.estimate import Work
from hasten.accel.costs.method import LayerStack, MethodCost, hessian_bytes, hessian_elements, rounding


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

    def cost(self, layers: LayerStack, pattern: Pattern) -> MethodCost:
        """A comparison of the weights without a factorisation, and two products with the Hessian.

        The products give the power of the output and of its error.
        """
        products = Work(exact_flops=4 * layers.rows * hessian_elements(layers.columns))
        # Finding the k-th smallest score copies all scores and their indices. A GPU holds the sums twice while they are
        # assembled.
        sums = hessian_bytes(layers.columns) * (2 if layers.gpu_memory else 1)
        return MethodCost(rounding(layers) + products, SOLVE_BYTES, prepared_bytes=sums)
