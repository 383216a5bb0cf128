"""GPTQ: quantize column by column, and let the remaining columns compensate for the error of the finished ones.

Source: Frantar et al. 2022, arXiv:2210.17323; scales fitted to the codes by coordinate descent, Kim et al. 2026,
arXiv:2602.02126.
Departs from it: solved as Babai's nearest plane on H itself (Chen et al. 2025, arXiv:2507.18553, show that the two are
the same algorithm). With H = L Lᵀ and columns visited from the last row of L to the first, the value to round in column
k is w_k + sum_{i>k} (w_i - q_i) L_ik / L_kk: one Cholesky factorisation, no inverse, and the sum over finished blocks
is one matrix product. Columns are stored in reverse order of visit. Where H cannot be factored, the damping grows
tenfold; past `max_damping`, columns are rounded independently.
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.calibration.factor import Factor, check_factor, factorise
from hasten.accel.compression.calibration.inputs import without
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.quantizers.base import QuantizedWeight, Quantizer, WeightScheme
from hasten.accel.compression.quantizers.block_grid import TRIED, AffineGrid, find_block_grid, fit_to_output
from hasten.accel.compression.quantizers.grid import find_grid, is_in_range, over_rows
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
from hasten.accel.models.ggml.base import BlockGrid, BlockType, BlockWeight
from hasten.kernels.nearest_plane import Plane, visit

# Columns behind which a matrix product carries their errors to all that are left.
_BLOCK = 128


@dataclass(frozen=True)
class _Solved:
    """Codes (C, R) in the order of the factor's rows, and their scales and zero points (G, R).

    error: (C, R); the squared length of its column r is the output error of row r, on the damped Hessian. tile: number
    of rows that share their scales.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    error: Tensor
    tile: int

    def where_better(self, other: "_Solved") -> "_Solved":
        """For every row, or tile of rows, the solution with the smaller error."""
        better = other._errors() < self._errors()
        return _Solved(
            torch.where(better, other.codes, self.codes),
            torch.where(better, other.scales, self.scales),
            torch.where(better, other.zeros, self.zeros),
            torch.where(better, other.error, self.error),
            self.tile,
        )

    def _errors(self) -> Tensor:
        return over_rows(self.error.square().sum(0), self.tile, Tensor.sum)


@dataclass(frozen=True)
class _SolvedBlocks:
    """The same in a block type. codes: (C, R). error: (R,), output error of every row."""

    codes: Tensor
    grid: BlockGrid
    error: Tensor

    def where_better(self, other: "_SolvedBlocks") -> "_SolvedBlocks":
        """For every row the solution with the smaller error."""
        better = other.error < self.error
        codes, error = torch.where(better, other.codes, self.codes), torch.where(better, other.error, self.error)
        return _SolvedBlocks(codes, self.grid.where(better, other.grid), error)


@dataclass(frozen=True)
class GPTQ(Quantizer[Factor]):
    """Quantizer that minimises the layer's output error on the calibration tokens.

    damping: added to the diagonal, as a share of its mean; None is 0.01 where there are 32 calibration tokens or more
    for each column, and else the one of least error on a half of the tokens that the factor is not made of, see
    calibration.factor.choose_damping. It is raised tenfold, up to max_damping, where H cannot be factored. act_order:
    `static` visits columns by descending diagonal of H, each with the scale of its own group; `none` visits them in
    their own order and computes a group's scale from its corrected weights. search, shrink: the ranges that are tried
    for each scale, see quantizers.grid.find_grid; 0 takes the full range. refits: number of times
    that the scales are fitted to the codes, by the output error; the columns are solved again between two fits. 0 is
    plain GPTQ.
    """

    damping: float | None = None
    max_damping: float = 1.0
    act_order: str = "static"
    search: int = 24
    shrink: float = 0.4
    refits: int = 2

    needs_hessian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_factor(self.damping, self.max_damping, self.act_order)
        if self.refits < 0:
            raise UserError(f"need refits >= 0, got {self.refits}")
        if self.search < 0 or not 0 < self.shrink < 1:
            raise UserError(f"need search >= 0 and 0 < shrink < 1, got search={self.search} shrink={self.shrink}")

    def prepare(self, hessian: Hessian | None) -> Factor:
        """Factor of the Hessian of the layers' input."""
        assert hessian is not None
        return factorise(hessian, self.damping, self.max_damping, self.act_order, "rounded to nearest")

    def quantize(self, weight: Tensor, prepared: Factor, scheme: WeightScheme) -> Result[QuantizedWeight]:
        """Codes of weight (R, C), in the checkpoint's dtype."""
        columns, scheme = weight.shape[1], scheme.bound(weight)
        target = weight.float()[:, prepared.order].T.contiguous()  # (C, R): a column is contiguous
        grid = None
        if self.act_order == "static" or scheme.columns(columns) == columns:
            scale, zero = find_grid(without(weight, prepared.dead_columns), scheme, self.search, self.shrink)
            grid = scheme.scales(scale).T.contiguous(), zero.T.contiguous()  # (G, R)
        best = self._solve(target, prepared, scheme, grid, weight.dtype)
        # A scale of all layers is not fitted to some of their rows.
        fits = prepared.is_known and scheme.strategy != "tensor"
        for refit in range(self.refits if fits else 0):
            solved = best
            if refit:
                solved = self._solve(target, prepared, scheme, (best.scales.clone(), best.zeros), weight.dtype)
            self._refit(solved, prepared, scheme, weight.dtype)
            best = solved if solved is best else best.where_better(solved)
        codes = best.codes[prepared.inverse_order()].T.contiguous()
        quantized = QuantizedWeight(
            codes,
            scheme.stored_scale(best.scales.T.contiguous(), weight.dtype),
            best.zeros.T.contiguous().to(torch.uint8),
            scheme,
        )
        power = prepared.power(target)
        error = prepared.power(target.sub_(quantized.dequantize().float()[:, prepared.order].T))
        return Result(quantized, error, power, prepared.notes, prepared.measures_output)

    def cost(self, layers: LayerStack, scheme: WeightScheme) -> MethodCost:
        """A search of the ranges, a factorisation, and a solve of all columns for each fit of the scales."""
        solve = rounding(layers) + range_search(layers, len(scheme.factors(self.search, self.shrink)))
        solve += column_visits(layers, max(1, self.refits))
        solve += scale_fits(layers, self.refits, layers.columns // scheme.columns(layers.columns))
        return factored_cost(layers, solve)

    def quantize_blocks(self, weight: Tensor, prepared: Factor, kind: type[BlockType]) -> Result[BlockWeight]:
        """Blocks of weight (R, C): factors of the scales are searched first, and block scales fitted to the codes.

        An error in a column adds its square times that of the pivot to the output error, because later columns
        compensate for the rest: the search weights errors so.
        """
        target = weight.float()[:, prepared.order].T.contiguous()  # (C, R)
        importance = prepared.errors()[prepared.inverse_order(), 0].square()
        grid = find_block_grid(without(weight, prepared.dead_columns), kind, importance)
        best: _SolvedBlocks | None = None
        for _ in range(max(1, self.refits)):
            affine = AffineGrid.of(kind, grid)
            solved = self._solve(target, prepared, affine, (affine.steps, affine.zeros), torch.float32)
            if self.refits and prepared.is_known:
                grid = fit_to_output(grid, kind, solved.codes, solved.error, prepared)
            found = _SolvedBlocks(solved.codes, grid, solved.error.square().sum(0))
            best = found if best is None else best.where_better(found)
        assert best is not None
        blocks = kind.encode(best.codes[prepared.inverse_order()].T.contiguous(), best.grid)
        quantized = BlockWeight(kind, blocks, weight.dtype)
        power = prepared.power(target)
        stored = quantized.dequantize().to(weight.dtype).float()
        error = prepared.power(target.sub_(stored[:, prepared.order].T))
        return Result(quantized, error, power, prepared.notes, prepared.measures_output)

    def blocks_cost(self, layers: LayerStack, kind: type[BlockType]) -> MethodCost:
        """A search of the scales, a factorisation, and a solve of all columns for each fit of the block scales."""
        solve = rounding(layers) + range_search(layers, TRIED) + column_visits(layers, max(1, self.refits))
        fits = self.refits * (1 if kind.middle is not None else 2)
        return factored_cost(layers, solve + scale_fits(layers, fits, layers.columns // kind.columns))

    def _solve(
        self,
        target: Tensor,
        prepared: Factor,
        scheme: WeightScheme | AffineGrid,
        grid: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
    ) -> "_Solved":
        """Nearest plane for target (C, R).

        grid: scales and zero points (G, R); None computes those of a group when the group is reached.
        """
        columns, rows = target.shape
        size = scheme.columns(columns)
        scales, zeros = grid or (target.new_empty(columns // size, rows), target.new_empty(columns // size, rows))
        groups = (prepared.order // size).cpu()
        codes = torch.empty(columns, rows, dtype=torch.uint8, device=target.device)
        residual = torch.zeros_like(target)  # w - q, column by column
        error = torch.empty_like(target)
        # Servers round products to the checkpoint's dtype; at 8 bits that is as coarse as the grid.
        unpacked = scheme.value_dtype(dtype)
        # Blocks of whole groups, so that each group is reached within a block, where its corrected weights are known.
        block = ceil(_BLOCK / size) * size if grid is None else _BLOCK
        for stop in range(columns, 0, -block):
            start = max(0, stop - block)
            span = slice(start, stop)
            plane = Plane(
                target[span],
                prepared.lower[span, span].tril(),
                scales,
                zeros,
                groups[span],
                scheme.points,
                unpacked,
                prepared.lower[stop:, span].T @ residual[stop:],  # error of the finished columns
                codes[span],
                residual[span],
                error[span],
            )
            if grid is not None:
                visit(plane, 0, stop - start)
                continue
            for last in range(stop - start, 0, -size):
                corrected = plane.target[last - size : last] + plane.carried[last - size : last]
                corrected.masked_fill_(prepared.dead[start:stop][last - size : last, None], 0.0)
                assert not isinstance(scheme, AffineGrid), "its steps are given"
                group = int(plane.groups[last - 1])
                scales[group], zeros[group] = self._group_grid(corrected.T, scheme, dtype)
                visit(plane, last - size, last)
        return _Solved(codes, scales, zeros, error.mul_(prepared.errors()), scheme.block_rows)

    @staticmethod
    def _refit(solved: "_Solved", prepared: Factor, scheme: WeightScheme, dtype: torch.dtype) -> None:
        """Fit the scales to the codes, in place, for the least output error; one group of columns at a time."""
        columns, place = len(prepared.order), prepared.inverse_order()
        size, tile = scheme.columns(columns), scheme.block_rows
        for group, (scale, zero) in enumerate(zip(solved.scales, solved.zeros, strict=True)):
            # (C, R): output of a scale of 1
            if size == columns:
                steps = prepared.outputs(scheme.values(solved.codes, zero))
            else:
                rows = place[group * size : (group + 1) * size]
                lower = prepared.lower[rows]
                lower = lower.masked_fill_(torch.arange(columns, device=rows.device) > rows[:, None], 0.0)
                steps = (lower.T @ scheme.values(solved.codes[rows], zero)).mul_(prepared.errors())
            length = over_rows(steps.square().sum(0), tile, Tensor.sum)
            along = over_rows((steps * solved.error).sum(0), tile, Tensor.sum)
            fitted = scheme.scales(scheme.stored_scale(scale + along / length, dtype))
            change = fitted - scale
            # A change is dropped where rounding the scale undoes the gain, where all weights of the group are coded as
            # zero (length 0), and where the scale would become zero, change its sign or overflow.
            gains = (change * (change * length - 2 * along) < 0) & (fitted * scale > 0)
            change.masked_fill_(~(gains & is_in_range(fitted, zero, scheme, dtype)), 0.0)
            scale += change
            solved.error.sub_(steps.mul_(change))

    def _group_grid(self, corrected: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale (R,) and zero point (R,), float32, of one group (R, group_size)."""
        whole = scheme.of_one_group()
        # Corrected weights may be beyond the range of float16.
        largest = torch.finfo(dtype).max
        scale, zero = find_grid(corrected.clamp(-largest, largest).to(dtype), whole, self.search, self.shrink)
        return scheme.scales(scale[:, 0]), zero[:, 0]
