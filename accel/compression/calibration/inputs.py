"""Statistics of a layer's input, for methods that need no factor of the Hessian; and the error that all methods report.

The error of a layer is the mean squared error of its outputs over the calibration tokens, on the Hessian as it was
collected, without damping. So errors of all methods and levels can be compared, which damped ones cannot.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.calibration.slabs import rows_at_once
from hasten.accel.compression.calibration.statistics import Hessian

# Inputs whose E[x²] is below the median by this factor are as good as always zero: it is half a unit in the last place
# of float32, and GELU leaves 1e-6 of the usual input where ReLU leaves 0.
_NEGLIGIBLE = 2.0**-24


@dataclass(frozen=True)
class Inputs:
    """Statistics of the layers' input. hessian: None where there are no statistics, or none that are finite."""

    hessian: Hessian | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, hessian: Hessian | None, instead: str) -> "Inputs":
        """Inputs with the Hessian where it is finite. instead: for the note, what the caller does where it is not."""
        # |E[x y]| is at most the root of E[x²] E[y²]: where the diagonal is finite, the whole matrix is.
        if hessian is not None and not bool(torch.isfinite(hessian.diagonal()).all()):
            return cls(None, (f"Hessian is not finite: {instead}",))
        return cls(hessian)

    def power(self, weight: Tensor) -> Tensor:
        """Mean squared output of every row of weight (R, C), or its squared weights, (R,) float32."""
        if self.hessian is not None:
            return self.hessian.power(weight.float())
        return torch.cat([slab.float().square().sum(1) for slab in weight.split(rows_at_once(weight, weight.shape[1]))])

    @property
    def dead_columns(self) -> Tensor | None:
        """See `dead_columns`; None where there are no statistics."""
        return None if self.hessian is None else dead_columns(self.hessian.diagonal())


def dead_columns(importance: Tensor) -> Tensor:
    """Columns (C,) bool whose input is always zero, or negligible, from E[x²] of every column, importance (C,).

    Their weights do not change the output on the calibration tokens, so no grid is fitted to them.
    """
    alive = importance[importance > 0]
    limit = float(alive.median()) * _NEGLIGIBLE if len(alive) else 0.0
    return importance <= (limit if math.isfinite(limit) else 0.0)


def without(weight: Tensor, dead: Tensor | None) -> Tensor:
    """Weight (R, C) with zeros in the columns `dead` (C,) bool; itself where there are none."""
    return weight if dead is None or not bool(dead.any()) else weight.masked_fill(dead, 0.0)
