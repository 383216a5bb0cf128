"""Base classes of pruners and sparsity patterns, and the pruned weight that pruners return."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.calibration.inputs import Inputs
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.method import Method, P
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError


class Pattern(ABC):
    """A sparsity pattern: how many weights of which columns are pruned in every row. Methods score the weights."""

    @property
    @abstractmethod
    def group_size(self) -> int | None:
        """Consecutive columns of which a fixed number is pruned; None where only the number in a whole row is fixed."""

    @abstractmethod
    def lowest(self, score: Tensor) -> Tensor:
        """Which weights are pruned, (R, C) bool: those with the lowest score (R, C), of equal ones the first."""


@dataclass(frozen=True)
class Sparsity(Pattern):
    """Unstructured sparsity: the fraction of weights that are zero, the same in every row."""

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"sparsity={self.fraction} is out of range: above 0 and below 1")

    @property
    def group_size(self) -> None:
        """None: only the number in a whole row is fixed."""
        return None

    def lowest(self, score: Tensor) -> Tensor:
        """Exactly pruned(C) weights of every row."""
        return lowest(score, self.pruned(score.shape[1]))

    def pruned(self, columns: int) -> int:
        """Number of weights that are pruned in a row with this many columns, rounded down."""
        # 0.3 of 10 columns are 3, although the product in floating point may be less.
        return int(self.fraction * columns + 1e-9)

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Exact size of a layer: one mask bit for every weight, and itemsize bytes for every kept weight."""
        return rows * columns + rows * (columns - self.pruned(columns)) * 8 * itemsize


@dataclass(frozen=True)
class PrunedWeight:
    """A pruned weight (R, C), dense, in the checkpoint's dtype.

    mask: (R, C) bool, True where a weight is kept; a kept weight may be zero by chance.
    """

    weight: Tensor
    mask: Tensor

    @property
    def bits(self) -> int:
        """Exact size: mask and kept weights."""
        return self.mask.numel() + int(self.mask.sum()) * 8 * self.weight.element_size()

    def rows(self, start: int, stop: int) -> "PrunedWeight":
        """Rows start to stop, such as those of one of several layers that were pruned together."""
        return PrunedWeight(self.weight[start:stop], self.mask[start:stop])

    @classmethod
    def join(cls, parts: list["PrunedWeight"]) -> "PrunedWeight":
        """One weight from its consecutive pieces."""
        return cls(torch.cat([part.weight for part in parts]), torch.cat([part.mask for part in parts]))


class Pruner(Method[P]):
    """A way to choose which weights of one linear layer to keep; layers that share an input may be stacked by rows.

    Every method prunes exactly as many weights of each row as the pattern says. So layers of equal shape have equal
    size, and no row depends on the rows stacked with it.
    """

    def cost(self, layers: LayerStack, pattern: Pattern) -> MethodCost | None:
        """Cost of prepare() and of the solve for layers of this shape; None where the method does not state it."""
        return None

    def dead_columns(self, prepared: P) -> Tensor | None:
        """Columns (C,) bool whose input is always zero, so that a grid need not fit their weights; None: not known."""
        return None

    @abstractmethod
    def prune(self, weight: Tensor, prepared: P, pattern: Pattern, grid: Grid | None = None) -> Result[PrunedWeight]:
        """Prune weight (R, C); the result has its dtype. prepared comes from prepare().

        grid: grid to which the kept weights are rounded; None for no rounding.
        """


class ScoredPruner(Pruner[Inputs]):
    """A pruner that scores weights independently; without statistics its errors are those of the weights."""

    def prepare(self, hessian: Hessian | None) -> Inputs:
        """Statistics of the input, by which every scored pruner, Magnitude too, reports errors of the output."""
        return Inputs.of(hessian, "weights alone were looked at")

    def dead_columns(self, prepared: Inputs) -> Tensor | None:
        """Those of the statistics."""
        return prepared.dead_columns


def lowest(score: Tensor, number: int | Tensor) -> Tensor:
    """Mask (R, C), bool, of exactly `number` lowest scores (R, C) in every row; of equal ones the first.

    number: the same for every row, or (R,) int64.
    """
    if isinstance(number, Tensor):
        number = number[:, None]
        limit = score.sort(1).values.gather(1, (number - 1).clamp_(min=0))
    else:
        limit = score.kthvalue(max(1, number), dim=1, keepdim=True).values
    below, equal = score < limit, score == limit
    # Ties are broken here, because the order of equal values in a sort differs between devices.
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= number - below.sum(1, keepdim=True)))


def prune_lowest(
    weight: Tensor, score: Tensor, inputs: Inputs, pattern: Pattern, grid: Grid | None
) -> Result[PrunedWeight]:
    """Prune the weights (R, C) of lowest score (R, C); the others stay, or are rounded to grid."""
    pruned = pattern.lowest(score)
    kept = weight.masked_fill(pruned, 0.0)
    result = PrunedWeight(kept if grid is None else grid.quantize(kept).dequantize(), ~pruned)
    lost = weight.float() - result.weight.float()
    return Result(result, inputs.power(lost), inputs.power(weight), inputs.notes, inputs.hessian is not None)
