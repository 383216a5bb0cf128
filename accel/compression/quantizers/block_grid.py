"""Scales and minima of ggml's block types, by search for the least weighted squared error.

Source: github.com/ggml-org/llama.cpp, whose importance matrix weights errors by E[x²] of the column.
Departs from it: factors of a block's scale are chosen with the rounded scale in sight, among the neighbours of the
exact ones; and scale and minimum of the block are then fitted to the codes once more.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from hasten.accel.compression.calibration.factor import Factor
from hasten.accel.compression.calibration.slabs import rows_at_once
from hasten.accel.models.ggml.base import BlockGrid, BlockType, combined
from hasten.kernels.grid_rounding import Points

# Steps that are tried for a group, as multiples of the full range divided by the number of codes.
_FACTORS = 16
_LEAST_FACTOR, _MOST_FACTOR = 0.55, 1.1
_FITS = 2
# Roundings of every weight in a search: of each factor, of its fit and again, and of the neighbours of each fit.
TRIED = 3 * _FACTORS + 11 * _FITS
_HALF = torch.finfo(torch.float16)
_BEYOND = 2.0**60


def find_block_grid(weight: Tensor, kind: type[BlockType], importance: Tensor | None = None) -> BlockGrid:
    """Scales of weight (R, C); importance: (C,) weight of each column's squared error, None for equal weights."""
    rows = rows_at_once(weight, weight.shape[1])
    parts = [_find(part.float(), kind, importance) for part in weight.split(rows)]
    return combined(parts, torch.cat)


def round_to_blocks(weight: Tensor, kind: type[BlockType], grid: BlockGrid) -> Tensor:
    """Nearest codes (R, C) uint8 of weight (R, C)."""
    groups = weight.float().unflatten(1, (-1, kind.group))
    return _nearest(groups, kind, *_expanded(kind, grid)).flatten(1).to(torch.uint8)


def _expanded(kind: type[BlockType], grid: BlockGrid) -> tuple[Tensor, Tensor | None]:
    """Steps and offsets (R, G, 1)."""
    offsets = grid.offsets()
    return grid.steps()[..., None], None if offsets is None else offsets[..., None]


def _nearest(groups: Tensor, kind: type[BlockType], steps: Tensor, offsets: Tensor | None) -> Tensor:
    """Nearest codes of groups (R, G, columns), float32; steps and offsets (R, G, 1)."""
    # All codes of a group whose step is zero have the same value.
    inverse = torch.where(steps == 0, 0.0, 1 / steps)
    if offsets is None:
        assert kind.middle is not None
        return (groups * inverse).round_().add_(kind.middle).clamp_(0, kind.top())
    return (groups + offsets).mul_(inverse).round_().clamp_(0, kind.top())


def _values(codes: Tensor, kind: type[BlockType], steps: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        assert kind.middle is not None
        return (codes - kind.middle).mul_(steps)
    return (codes * steps).sub_(offsets)


def _loss(
    groups: Tensor, importance: Tensor, kind: type[BlockType], steps: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted squared error of each group (R, G, 1), and the codes of least error."""
    codes = _nearest(groups, kind, steps, offsets)
    error = _values(codes, kind, steps, offsets).sub_(groups).square_().mul_(importance)
    return error.sum(-1, keepdim=True), codes


def _find(weight: Tensor, kind: type[BlockType], importance: Tensor | None) -> BlockGrid:
    rows, columns = weight.shape
    groups = weight.view(rows, -1, kind.group)
    weights = torch.ones(columns, device=weight.device) if importance is None else importance.float()
    weights = weights.view(1, -1, kind.group)
    # A group whose inputs are all zero is rounded as if they were equal.
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, torch.ones_like(weights))
    steps, offsets = _search(groups, weights, kind)
    if kind.scale_range is None:
        scale = steps[..., 0].clamp(-_HALF.max, _HALF.max).half()
        minimum = None if offsets is None else offsets[..., 0].clamp(-_HALF.max, _HALF.max).half()
        return _refit(groups, weights, kind, BlockGrid(scale, minimum))
    grid = _factored(steps, offsets, kind, rows, columns // kind.columns)
    for _ in range(_FITS):
        grid = _refit(groups, weights, kind, _neighbours(groups, weights, kind, grid))
    return grid


def _search(groups: Tensor, weights: Tensor, kind: type[BlockType]) -> tuple[Tensor, Tensor | None]:
    """Best exact step and offset (R, G, 1) of every group."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    starts: list[tuple[Tensor, Tensor | None]]
    best: Tensor | None = None
    best_steps: Tensor = groups[..., :1]
    best_offsets: Tensor | None = None
    if kind.middle is not None:
        peak = torch.where(-low >= high, low, high)
        # The grid has one step more on the side of code 0: the sign of the step puts the peak there, or not.
        whole = -peak / kind.middle
        shares = torch.linspace(_LEAST_FACTOR, _MOST_FACTOR, _FACTORS // 2).tolist()
        starts = [(whole * share * sign, None) for share in shares for sign in (1.0, -1.0)]
    else:
        if kind.scale_range is not None:
            # Minima of these types are never positive values, and their steps are not negative.
            low = low.clamp(max=0)
        high = high.maximum(low)
        middle, half = (low + high) / 2, (high - low) / 2
        shares = torch.linspace(_LEAST_FACTOR, _MOST_FACTOR, _FACTORS).tolist()
        starts = []
        for share in shares:
            bottom = middle - half * share
            if kind.scale_range is not None:
                bottom = bottom.clamp(max=0)
            starts.append((2 * half * share / kind.top(), -bottom))
    for steps, offsets in starts:
        _, codes = _loss(groups, weights, kind, steps, offsets)
        for fitted in ((steps, offsets), _fit(groups, weights, codes, kind)):
            loss, _ = _loss(groups, weights, kind, *fitted)
            if best is None:
                (best_steps, best_offsets), best = fitted, loss
                continue
            better = loss < best
            best = torch.where(better, loss, best)
            best_steps = torch.where(better, fitted[0], best_steps)
            if best_offsets is not None and fitted[1] is not None:
                best_offsets = torch.where(better, fitted[1], best_offsets)
    return best_steps, best_offsets


def _fit(groups: Tensor, weights: Tensor, codes: Tensor, kind: type[BlockType]) -> tuple[Tensor, Tensor | None]:
    """Step and offset (R, G, 1) of least weighted squared error for these codes."""
    if kind.middle is not None:
        return _slope(groups, weights, codes - kind.middle), None
    total = weights.sum(-1, keepdim=True)
    code, value = (weights * codes).sum(-1, keepdim=True), (weights * groups).sum(-1, keepdim=True)
    square, cross = (weights * codes.square()).sum(-1, keepdim=True), (weights * codes * groups).sum(-1, keepdim=True)
    determinant = total * square - code.square()
    # Equal codes leave the step open.
    is_open = determinant <= 1e-6 * total * square
    safe = determinant.masked_fill(is_open, 1.0)
    steps = ((total * cross - code * value) / safe).masked_fill_(is_open, 0.0)
    offsets = -(square * value - code * cross) / safe
    offsets = torch.where(is_open, -value / total, offsets)
    if kind.scale_range is not None:
        steps = torch.where(offsets < 0, _slope(groups, weights, codes), steps).clamp_(min=0)
        offsets = offsets.clamp(min=0)
    return steps, offsets


def _slope(groups: Tensor, weights: Tensor, multiples: Tensor) -> Tensor:
    square = (weights * multiples.square()).sum(-1, keepdim=True)
    return torch.where(square > 0, (weights * multiples * groups).sum(-1, keepdim=True) / square, 0.0)


def _factored(steps: Tensor, offsets: Tensor | None, kind: type[BlockType], rows: int, blocks: int) -> BlockGrid:
    """Block scales in float16 that reach the largest step and offset, and the factors nearest to the exact ones."""
    assert kind.scale_range is not None
    least, most = kind.scale_range

    def factors(exact: Tensor) -> tuple[Tensor, Tensor]:
        exact = exact.view(rows, blocks, -1)
        largest = exact.gather(-1, exact.abs().argmax(-1, keepdim=True))
        scale = (largest / (least or most)).clamp(-_HALF.max, _HALF.max).half()
        inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
        whole = (exact * inverse).round_().clamp_(least, most).to(torch.int16)
        return scale[..., 0], whole.flatten(1)

    scale, scales = factors(steps)
    minimum, minima = factors(offsets) if offsets is not None else (None, None)
    return BlockGrid(scale, minimum, scales, minima)


def _neighbours(groups: Tensor, weights: Tensor, kind: type[BlockType], grid: BlockGrid) -> BlockGrid:
    """The grid with the best factors of every group among those next to the given ones."""
    assert kind.scale_range is not None
    assert grid.scales is not None
    least, most = kind.scale_range
    best: Tensor | None = None
    best_scales, best_minima = grid.scales, grid.minima
    changes = product((0, -1, 1), (0,) if grid.minima is None else (0, -1, 1))
    for change, shift in changes:
        scales = (grid.scales + change).clamp_(least, most)
        minima = None if grid.minima is None else (grid.minima + shift).clamp_(least, most)
        loss, _ = _loss(groups, weights, kind, *_expanded(kind, replace(grid, scales=scales, minima=minima)))
        loss = loss[..., 0]
        if best is None:
            best = loss
            continue
        better = loss < best
        best = torch.where(better, loss, best)
        best_scales = torch.where(better, scales, best_scales)
        if best_minima is not None and minima is not None:
            best_minima = torch.where(better, minima, best_minima)
    return replace(grid, scales=best_scales, minima=best_minima)


def _refit(groups: Tensor, weights: Tensor, kind: type[BlockType], grid: BlockGrid) -> BlockGrid:
    """The grid with block scales and minima fitted to its codes, in blocks where that lowers the error."""
    loss, codes = _loss(groups, weights, kind, *_expanded(kind, grid))
    fitted = fit_blocks(groups, weights, codes, kind, grid)
    new, _ = _loss(groups, weights, kind, *_expanded(kind, fitted))
    blocks = grid.scale.shape[1]
    totals = [part.view(len(groups), blocks, -1).sum(-1) for part in (loss, new)]
    better = totals[1] < totals[0]
    scale = torch.where(better, fitted.scale, grid.scale)
    minimum = None
    if grid.minimum is not None and fitted.minimum is not None:
        minimum = torch.where(better, fitted.minimum, grid.minimum)
    return replace(grid, scale=scale, minimum=minimum)


def fit_blocks(groups: Tensor, weights: Tensor, codes: Tensor, kind: type[BlockType], grid: BlockGrid) -> BlockGrid:
    """Float16 scale and minimum of every block by least squares, for these codes (R, G, columns) and factors."""
    rows, blocks = grid.scale.shape
    if kind.middle is not None:
        multiples = codes - kind.middle
        if grid.scales is not None:
            multiples = multiples * grid.scales[..., None]
        slope = _slope(*(_by_block(part, rows, blocks) for part in (groups, weights.expand_as(groups), multiples)))
        return replace(grid, scale=_halved(slope[..., 0], grid.scale))
    assert grid.minimum is not None
    multiples = codes if grid.scales is None else codes * grid.scales[..., None]
    ones = torch.ones_like(codes) if grid.minima is None else (grid.minima[..., None] * torch.ones_like(codes))
    target, weight, first, second = (
        _by_block(part, rows, blocks) for part in (groups, weights.expand_as(groups), multiples, ones)
    )
    aa, bb = (weight * first.square()).sum(-1), (weight * second.square()).sum(-1)
    ab, ax, bx = (
        (weight * first * second).sum(-1),
        (weight * first * target).sum(-1),
        (weight * second * target).sum(-1),
    )
    determinant = aa * bb - ab.square()
    is_open = determinant <= 1e-6 * aa * bb
    safe = determinant.masked_fill(is_open, 1.0)
    scale, minimum = (ax * bb - bx * ab) / safe, (ax * ab - bx * aa) / safe
    # Codes and minima that are in proportion determine only one of the two.
    scale, minimum = (
        torch.where(is_open, old.float(), new) for old, new in ((grid.scale, scale), (grid.minimum, minimum))
    )
    return replace(grid, scale=_halved(scale, grid.scale), minimum=_halved(minimum, grid.minimum))


def _by_block(values: Tensor, rows: int, blocks: int) -> Tensor:
    return values.reshape(rows, blocks, -1)


def _halved(values: Tensor, old: Tensor) -> Tensor:
    """Values as float16; the old ones where they are beyond its range."""
    halved = values.half()
    return torch.where(halved.isfinite(), halved, old)


@dataclass(frozen=True)
class AffineGrid:
    """Fixed steps and offsets as a uniform grid with zero points that are no whole numbers.

    steps, zeros: (G, R) float32; the value of a code is (code - zero) * step.
    """

    kind: type[BlockType]
    steps: Tensor
    zeros: Tensor

    def columns(self, total: int) -> int:
        """Number of columns that share a scale."""
        return self.kind.group

    block_rows = 1

    @property
    def points(self) -> Points:
        """Whole numbers of so many bits."""
        return Points("int", self.kind.bits)

    def value_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """llama.cpp computes with the float32 values."""
        return torch.float32

    @classmethod
    def of(cls, kind: type[BlockType], grid: BlockGrid) -> "AffineGrid":
        """Grid of a matrix."""
        steps, offsets = grid.steps().T.contiguous(), grid.offsets()
        # All codes of a group whose step is zero have one value: a step far beyond all weights gives code 0, or the
        # middle one, to all of them, and the value exactly.
        steps = steps.masked_fill(steps == 0, _BEYOND)
        if offsets is None:
            assert kind.middle is not None
            return cls(kind, steps, torch.full_like(steps, kind.middle))
        return cls(kind, steps, (offsets.T / steps).contiguous())


def fit_to_output(grid: BlockGrid, kind: type[BlockType], codes: Tensor, error: Tensor, prepared: Factor) -> BlockGrid:
    """The grid with block scales and minima fitted to the codes (C, R) one by one, for the least output error.

    codes and error (C, R) are in the order of the factor's rows; the squared length of a column of error is a row's
    output error, and error is changed to that of the new grid. Source: Kim et al. 2026, arXiv:2602.02126.
    """
    place, columns = prepared.inverse_order(), len(prepared.order)
    scale = grid.scale.clone()
    minimum = None if grid.minimum is None else grid.minimum.clone()
    for block in range(scale.shape[1]):
        rows = place[block * kind.columns : (block + 1) * kind.columns]
        lower = prepared.lower[rows]
        lower = lower.masked_fill_(torch.arange(columns, device=rows.device) > rows[:, None], 0.0)
        groups = slice(block * kind.columns // kind.group, (block + 1) * kind.columns // kind.group)
        multiples = codes[rows].float() - (kind.middle or 0)
        for values, factors, sign in ((scale, grid.scales, 1), (minimum, grid.minima, -1)):
            if values is None:
                continue
            part = multiples if sign == 1 else torch.full_like(multiples, -1.0)
            if factors is not None:
                part = part * factors[:, groups].float().T.repeat_interleave(kind.group, 0)
            outputs = (lower.T @ part).mul_(prepared.errors())  # (C, R): output of a scale of 1
            length, along = outputs.square().sum(0), (outputs * error).sum(0)
            old = values[:, block].float()
            change = (old + along / length).half().float() - old
            # A change is dropped where rounding it undoes the gain, and where it is not finite.
            change = torch.where(change * (change * length - 2 * along) < 0, change, 0.0)
            values[:, block] = (old + change).half()
            error.sub_(outputs.mul_(change))
    return replace(grid, scale=scale, minimum=minimum)
