"""Wanda: the weights go that add least to the output, each for itself.

Source: Sun et al. 2023, arXiv:2306.11695: |w_ij| times the root mean square of input j, compared within each row.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.accel.compression.calibration.slabs import SOLVE_BYTES
from hasten.accel.compression.pruners.base import Inputs, PrunedWeight, Pruner, Sparsity, prune_lowest
from hasten.accel.compression.result import Result
from hasten.accel.costs.estimate import Work
from hasten.accel.costs.method import LayerStack, MethodCost, moment_bytes, moment_elements, rounding


@dataclass(frozen=True)
class Wanda(Pruner):
    """Pruner by weight and input norm; the weights that are kept stay as they are."""

    needs_second_moment: ClassVar[bool] = True

    def prune(self, weight: Tensor, prepared: Inputs, sparsity: Sparsity) -> Result[PrunedWeight]:
        """Weight (R, C) without the entries of the lowest product in each row."""
        score = weight.float().abs()
        if prepared.moment is not None:
            score.mul_(prepared.moment.diagonal().sqrt())
        return prune_lowest(weight, score, prepared, sparsity)

    def cost(self, layers: LayerStack, sparsity: Sparsity) -> MethodCost:
        """Weights are compared as they are, without a factorisation.

        What is left and what is lost of the output is told by a product with the second moment each.
        """
        products = Work(exact_flops=4 * layers.rows * moment_elements(layers.columns))
        # The k-th smallest score takes a copy of all scores and their places. On a GPU the sums lie there once more
        # while they are put together.
        sums = moment_bytes(layers.columns) * (2 if layers.gpu_memory else 1)
        return MethodCost(rounding(layers) + products, SOLVE_BYTES, prepared_bytes=sums)
