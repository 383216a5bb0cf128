"""BAQ over columns: bits for every input column of a layer in closed form, from its loss at equal bits.

Source: Chao Zhang et al. 2025, arXiv:2506.05664. A first pass of GPTQ over the columns, at equal bits, gives the loss
of each column. At b bits a column has the loss c 2^(-2b). The sum is least, at a given mean, where a column has that
mean plus log2(loss / geometric mean of all losses) / 2 bits. A second pass quantizes at these bits.
Departs from it: bits are whole and their mean is exact, so that codes can be packed and counted. The paper allows any
number of levels, only comes near the mean, and counts neither the columns' bits nor the rows' ranges in the size. The
step of a column is not the row's range divided by the number of levels, but the step of least error for normal weights,
times one scale a row: the range that is right at 8 bits is twice the best one at 2 bits. On down_proj of the embedded
target's second block, 3 bits on average have 24 % less error than equal bits; with the paper's grid, 1 % less. The
scale is searched by the error of the columns at their own bits, and then fitted to the codes (Kim et al. 2026,
arXiv:2602.02126). As in the paper, bits belong to a layer: losses are summed over all its rows and no others. So
layers are solved one by one, large ones in pieces of rows, and the result does not depend on other layers.
Columns are visited on H = L Lᵀ itself (see hasten.accel.compression.calibration.factor).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.allocators.baq import column_bits
from hasten.accel.compression.calibration.factor import Factor, check_factor, factorise
from hasten.accel.compression.calibration.slabs import rows_at_once
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.quantizers.columns import (
    MAX_WIDTH,
    MIN_WIDTH,
    ColumnBits,
    ColumnQuantizer,
    ColumnWeight,
    steps,
)
from hasten.accel.compression.result import Result
from hasten.accel.costs.method import (
    LayerStack,
    MethodCost,
    column_visits,
    factored_cost,
    range_search,
    rounding,
    scale_fits,
)
from hasten.accel.errors import UserError

# Columns visited one by one before a matrix product propagates their error to the rest of the block.
_INNER = 32
_BLOCK = 128


@dataclass(frozen=True)
class _Grid:
    """Steps at a scale of 1, and largest codes: (C, 1) float32 each, columns in the order of the factor's rows."""

    step: Tensor
    top: Tensor

    @classmethod
    def of(cls, widths: Tensor) -> "_Grid":
        return cls(steps(widths)[:, None], (2.0 ** widths.float() - 1)[:, None])


@dataclass(frozen=True)
class _Solved:
    """Codes (C, R) in the order of the factor's rows and scales (R,).

    error: (C, R); the squared length of its column r is the output error of row r, on the damped Hessian.
    """

    codes: Tensor
    scale: Tensor
    error: Tensor

    def where_better(self, other: "_Solved") -> "_Solved":
        """For every row the solution with the smaller error."""
        better = other.error.square().sum(0) < self.error.square().sum(0)
        return _Solved(
            torch.where(better, other.codes, self.codes),
            torch.where(better, other.scale, self.scale),
            torch.where(better, other.error, self.error),
        )


@dataclass(frozen=True)
class ColumnwiseBAQ(ColumnQuantizer[Factor | None]):
    """Quantizer that spreads bits over the columns of a layer by their share of the output error.

    damping, max_damping, act_order: see quantizers.gptq.GPTQ. lowest, highest: bounds of a column's bits. search:
    number of scales tried for every row. refits: number of times that scales are fitted to the codes; the columns are
    solved again between two fits.
    """

    damping: float | None = None
    max_damping: float = 1.0
    act_order: str = "static"
    lowest: int = 1
    highest: int = 8
    search: int = 32
    refits: int = 2

    needs_hessian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_factor(self.damping, self.max_damping, self.act_order)
        if not MIN_WIDTH <= self.lowest <= self.highest <= MAX_WIDTH:
            raise UserError(
                f"need {MIN_WIDTH} <= lowest <= highest <= {MAX_WIDTH}, got lowest={self.lowest} highest={self.highest}"
            )
        if self.search < 2 or self.refits < 0:
            raise UserError(f"need search >= 2 and refits >= 0, got search={self.search} refits={self.refits}")

    def check(self, level: ColumnBits) -> None:
        """UserError where the mean is not between the lowest and the highest bits."""
        if not self.lowest <= level.mean <= self.highest:
            raise UserError(f"column_bits={level.mean:g} is out of range: {self.lowest} to {self.highest}")

    def prepare(self, hessian: Hessian | None) -> Factor | None:
        """Factor of the Hessian of the layers' input."""
        if hessian is None:
            return None
        return factorise(hessian, self.damping, self.max_damping, self.act_order, "columns were rounded on their own")

    def cost(self, layers: LayerStack, level: ColumnBits) -> MethodCost:
        """A search of the rows' scales, and a solve for each fit of them."""
        solve = rounding(layers) + range_search(layers, self.search)
        solve += column_visits(layers, max(1, self.refits)) + scale_fits(layers, self.refits, groups=1)
        return factored_cost(layers, solve)

    def losses(self, weight: Tensor, prepared: Factor | None, level: ColumnBits) -> Tensor:
        """Output error of every column of weight (R, C) at equal bits, the nearest to the mean, (C,) float64."""
        factor = prepared or _identity(weight)
        equal = min(self.highest, max(self.lowest, int(level.mean + 0.5)))
        grid = _Grid.of(torch.full_like(factor.order, equal))
        target, pivots = _target(weight, factor), factor.errors()
        scale = self._search(target, pivots, grid, weight.dtype)
        error = _solve(target, factor, grid, scale, weight.dtype).error
        return error.double().square_().sum(1)[factor.inverse_order()]

    def widths(self, losses: Tensor, level: ColumnBits) -> Tensor:
        """Bits of every column by the closed form, (C,) uint8, from losses (C,)."""
        return column_bits(losses, level.mean, self.lowest, self.highest).to(torch.uint8)

    def encode(self, weight: Tensor, prepared: Factor | None, widths: Tensor) -> Result[ColumnWeight]:
        """Codes of weight (R, C) at these widths (C,); the scales have the weight's dtype."""
        factor, dtype = prepared or _identity(weight), weight.dtype
        grid = _Grid.of(widths.to(weight.device)[factor.order])
        target, pivots = _target(weight, factor), factor.errors()
        best = _solve(target, factor, grid, self._search(target, pivots, grid, dtype), dtype)
        for refit in range(self.refits):
            solved = _solve(target, factor, grid, best.scale, dtype) if refit else best
            solved = _refit(solved, factor, grid, dtype)
            best = best.where_better(solved)
        codes = best.codes[factor.inverse_order()].T.contiguous()
        quantized = ColumnWeight(codes, widths.to(torch.uint8), best.scale.to(dtype))
        power = factor.power(target)
        error = factor.power(target.sub_(quantized.dequantize().float()[:, factor.order].T))
        return Result(quantized, error, power, factor.notes, factor.measures_output)

    def _search(self, target: Tensor, pivots: Tensor, grid: _Grid, dtype: torch.dtype) -> Tensor:
        """Best scale (R,), rounded to dtype, of every row of target (C, R) where columns do not compensate errors."""
        if not bool(pivots.all()):
            # Weights of dead inputs must not widen the range of the scales that are tried.
            target = target.masked_fill(pivots == 0, 0.0)
        step = rows_at_once(target, len(target))
        return torch.cat([self._search_slab(part, pivots, grid, dtype) for part in target.split(step, dim=1)])

    def _search_slab(self, target: Tensor, pivots: Tensor, grid: _Grid, dtype: torch.dtype) -> Tensor:
        root, peak = target.square().mean(0).sqrt(), target.abs().amax(0)
        # For normal numbers the best scale is their root mean square; it is smaller at few bits and for light tails,
        # and larger where there are outliers.
        low, high = 0.3 * root, torch.maximum(1.6 * root, peak / 2)
        ratio = high / low.clamp(min=torch.finfo(torch.float32).tiny)
        best, least_loss = low, torch.full_like(low, torch.inf)
        for index in range(self.search):
            scale = (low * ratio ** (index / (self.search - 1))).to(dtype).float()
            value = _values(_codes(target, grid, scale), grid, scale)
            loss = value.sub_(target).mul_(pivots).square_().sum(0)
            better = loss < least_loss
            least_loss, best = torch.where(better, loss, least_loss), torch.where(better, scale, best)
        return best


def _identity(weight: Tensor) -> Factor:
    """Factor of the identity, used where there are no statistics of the input."""
    columns = weight.shape[1]
    ones = torch.ones(columns, device=weight.device)
    order = torch.arange(columns - 1, -1, -1, device=weight.device)
    dead = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    return Factor(torch.eye(columns, device=weight.device), ones, order, dead, 0.0, (), is_known=False)


def _target(weight: Tensor, factor: Factor) -> Tensor:
    return weight.float()[:, factor.order].T.contiguous()  # (C, R): a column is contiguous


def _codes(values: Tensor, grid: _Grid, scale: Tensor) -> Tensor:
    """Nearest codes (C, R) of values, float32; arbitrary where a scale is zero."""
    step = grid.step * scale
    step = step.masked_fill_(step == 0, 1.0)
    return torch.minimum((values / step).add_(grid.top / 2).round_().clamp_(min=0), grid.top)


def _values(codes: Tensor, grid: _Grid, scale: Tensor) -> Tensor:
    return (codes - grid.top / 2).mul_(grid.step).mul_(scale)


def _outputs(values: Tensor, factor: Factor) -> Tensor:
    """Matrix (C, R) whose columns have the mean squared outputs of the weights `values` (C, R) as squared lengths."""
    return (factor.lower.tril().T @ values).mul_(factor.errors())


def _solve(target: Tensor, factor: Factor, grid: _Grid, scale: Tensor, dtype: torch.dtype) -> _Solved:
    """Nearest plane for target (C, R) at scales (R,)."""
    columns = len(target)
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    # In float16 the outermost codes of some columns may be beyond the range of numbers.
    largest = torch.finfo(dtype).max
    is_limited = bool((scale.max() * (grid.top / 2 * grid.step).max()).gt(largest))
    residual, error = torch.zeros_like(target), torch.empty_like(target)  # residual: w - q, column by column
    for stop in range(columns, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        carried = factor.lower[stop:, start:stop].T @ residual[stop:]  # (block, R): error of the finished columns
        for last in range(stop, start, -_INNER):
            first = max(start, last - _INNER)
            for k in range(last - 1, first - 1, -1):
                column_grid = _Grid(grid.step[k], grid.top[k])
                value_to_round = target[k] + carried[k - start]
                code = _codes(value_to_round, column_grid, scale)
                if is_limited:
                    # As a number of steps from the middle, which lies between two codes where top is odd, as always.
                    reach = (largest / (column_grid.step * scale) - 0.5).floor_() + 0.5
                    middle = column_grid.top / 2
                    code = torch.minimum(torch.maximum(code, middle - reach), middle + reach)
                codes[k] = code
                # Unpacking rounds the product to the checkpoint's dtype.
                value = _values(code, column_grid, scale).to(dtype).float()
                torch.sub(target[k], value, out=residual[k])
                torch.sub(value_to_round, value, out=error[k])
                carried[first - start : k - start].addr_(factor.lower[k, first:k], residual[k])
            carried[: first - start].addmm_(factor.lower[first:last, start:first].T, residual[first:last])
    return _Solved(codes, scale, error.mul_(factor.errors()))


def _refit(solved: _Solved, factor: Factor, grid: _Grid, dtype: torch.dtype) -> _Solved:
    """The same codes with the scales of least output error."""
    ones = torch.ones_like(solved.scale)
    values = _values(solved.codes.float(), grid, ones)
    outputs, peak = _outputs(values, factor), values.abs().amax(0)  # at a scale of 1
    length, along = outputs.square().sum(0), (outputs * solved.error).sum(0)
    fitted = (solved.scale + along / length).to(dtype).float()
    change = fitted - solved.scale
    # A change is dropped where rounding the scale undoes the gain, and where a value would overflow; a scale of zero
    # stays zero.
    gains = (change * (change * length - 2 * along) < 0) & (fitted * solved.scale > 0)
    change.masked_fill_(~(gains & (fitted * peak <= torch.finfo(dtype).max)), 0.0)
    return _Solved(solved.codes, solved.scale + change, solved.error - outputs.mul_(change))
