"""What every pruner takes and gives back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.method import Method, P
from hasten.accel.compression.quantizers.grid import Grid
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import LayerStack, MethodCost
from hasten.accel.errors import UserError


class Pattern(ABC):
    """How many weights of which columns are set to zero, the same in every row; methods score the weights."""

    @property
    @abstractmethod
    def group_size(self) -> int | None:
        """Consecutive columns of which a fixed number goes, None where that is so of a whole row alone."""

    @abstractmethod
    def lowest(self, score: Tensor) -> Tensor:
        """The weights that go, (R, C) bool: those of the lowest score (R, C), of equal ones the first."""


@dataclass(frozen=True)
class Sparsity(Pattern):
    """Share of a layer's weights that are set to zero, the same in every row, wherever in the row."""

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"sparsity={self.fraction} is out of range: above 0 and below 1")

    @property
    def group_size(self) -> None:
        """Rows alone count."""
        return None

    def lowest(self, score: Tensor) -> Tensor:
        """Exactly pruned(C) weights of every row."""
        return lowest(score, self.pruned(score.shape[1]))

    def pruned(self, columns: int) -> int:
        """Weights set to zero in every row of so many columns, rounded down."""
        # 0.3 of 10 columns are 3, whatever the last bit of the product says.
        return int(self.fraction * columns + 1e-9)

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Exact size of a layer: a bit of mask for every weight, and itemsize bytes for every one that is kept."""
        return rows * columns + rows * (columns - self.pruned(columns)) * 8 * itemsize


@dataclass(frozen=True)
class PrunedWeight:
    """A weight (R, C) in the checkpoint's dtype of which some are zero.

    mask: (R, C) bool, True where a weight is kept; a kept weight may happen to be zero.
    """

    weight: Tensor
    mask: Tensor

    @property
    def bits(self) -> int:
        """Exact size: mask and kept weights."""
        return self.mask.numel() + int(self.mask.sum()) * 8 * self.weight.element_size()

    def rows(self, start: int, stop: int) -> "PrunedWeight":
        """The rows of one of several layers that were pruned together."""
        return PrunedWeight(self.weight[start:stop], self.mask[start:stop])

    @classmethod
    def join(cls, parts: list["PrunedWeight"]) -> "PrunedWeight":
        """Consecutive rows as one weight."""
        return cls(torch.cat([part.weight for part in parts]), torch.cat([part.mask for part in parts]))


@dataclass(frozen=True)
class Inputs:
    """What is known of the input of layers. hessian: None where that is nothing, or nothing that can be used."""

    hessian: Hessian | None
    notes: tuple[str, ...] = ()

    def power(self, weight: Tensor) -> Tensor:
        """Mean squared output of every row of weight (R, C), or its squared weights, (R,) float32."""
        weight = weight.float()
        if self.hessian is None:
            return weight.square().sum(1)
        # Only the panels up to the diagonal are kept: what they have left of their square counts twice.
        total = weight.new_zeros(len(weight))
        for panel in self.hessian.panels():
            size, stop = panel.shape
            outputs = weight[:, stop - size : stop] @ panel
            outputs[:, : stop - size] *= 2
            total += outputs.mul_(weight[:, :stop]).sum(1)
        return total.div_(self.hessian.tokens).clamp_(min=0)


class Pruner(Method[P]):
    """A way to choose which weights of one linear layer to keep; layers that share an input may be stacked by rows.

    Every method sets exactly as many weights of every row to zero as the pattern says: layers of equal shape have equal
    size, and no row depends on those that are stacked with it.
    """

    def cost(self, layers: LayerStack, pattern: Pattern) -> MethodCost | None:
        """What prepare() and the solve of layers of this shape take; None where the method does not state it."""
        return None

    @abstractmethod
    def prune(self, weight: Tensor, prepared: P, pattern: Pattern, grid: Grid | None = None) -> Result[PrunedWeight]:
        """Prune weight (R, C), whose dtype stays; prepared comes from prepare().

        grid: what the kept weights are rounded to; None leaves them where they are, or the method puts them.
        """


class ScoredPruner(Pruner[Inputs]):
    """A pruner that scores every weight for itself; without statistics it tells errors of the weights."""

    def prepare(self, hessian: Hessian | None) -> Inputs:
        """What is known of the input, by which Magnitude, too, tells errors of the output."""
        # |E[x y]| is at most the root of E[x²] E[y²]: where these are finite, all of it is.
        if hessian is not None and not bool(torch.isfinite(hessian.diagonal()).all()):
            return Inputs(None, ("Hessian is not finite: weights alone were looked at",))
        return Inputs(hessian)


def lowest(score: Tensor, number: int | Tensor) -> Tensor:
    """Where the lowest scores (R, C) of every row are, bool, exactly number in each; of equal ones the first.

    number: of every row the same, or (R,) int64.
    """
    if isinstance(number, Tensor):
        number = number[:, None]
        limit = score.sort(1).values.gather(1, (number - 1).clamp_(min=0))
    else:
        limit = score.kthvalue(max(1, number), dim=1, keepdim=True).values
    below, equal = score < limit, score == limit
    # Which of equal values a sort puts first is not the same on every device.
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= number - below.sum(1, keepdim=True)))


def prune_lowest(
    weight: Tensor, score: Tensor, inputs: Inputs, pattern: Pattern, grid: Grid | None
) -> Result[PrunedWeight]:
    """Weight (R, C) without those of the lowest score (R, C), the others as they are or as grid has them."""
    pruned = pattern.lowest(score)
    kept = weight.masked_fill(pruned, 0.0)
    left = PrunedWeight(kept if grid is None else grid.quantize(kept).dequantize(), ~pruned)
    return Result(left, inputs.power(weight - left.weight), inputs.power(weight), inputs.notes)
