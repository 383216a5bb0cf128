"""Scales and zero points of grids, by range or by search for the least squared error.

Source: Nagel et al. 2021, arXiv:2106.08295, section 3.1 (range setting by mean squared error); Frantar et al. 2022,
arXiv:2210.17323, whose code searches shrunk ranges. Departs from them: how far the range of integers is shrunk depends
on the group, because a group with outliers may need a tenth of its range, and most groups never less than a third.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.calibration.slabs import rows_at_once
from hasten.accel.compression.quantizers.base import QuantizedWeight, WeightScheme
from hasten.kernels.grid_rounding import encode, losses

# Ratio of two ranges below the usual ones.
_FINER = 0.9


@dataclass(frozen=True)
class Grid:
    """Grid to which weights (R, C) are rounded.

    scale: (R, G) as stored. zero_point: (R, G) float32, whole numbers.
    """

    scheme: WeightScheme
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,
        scheme: WeightScheme,
        search: int = 0,
        shrink: float = 0.6,
        dtype: torch.dtype | None = None,
    ) -> "Grid":
        """Grid for weight (R, C); search, shrink and dtype: see find_grid."""
        bound = scheme.bound(weight)
        return cls(bound, *find_grid(weight, bound, search, shrink, dtype))

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Nearest codes of weight (R, C); zeros, and all values on the grid, are represented exactly."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales = self.scheme.scales(self.scale)
        step = rows_at_once(weight, weight.shape[1])
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            groups = weight[rows].float().unflatten(1, (scales.shape[1], -1))
            codes[rows] = encode(groups, scales[rows], self.zero_point[rows], self.scheme.points).flatten(1)
        return QuantizedWeight(codes, self.scale, self.zero_point.to(torch.uint8), self.scheme)

    def of_columns(self, order: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scale and zero point, (R,) float32 each, of every input column, in the given order (C,)."""
        scales, zeros = self.scheme.scales(self.scale).T.contiguous(), self.zero_point.T.contiguous()
        size = self.scheme.columns(len(order))
        return [(scales[group], zeros[group]) for group in (order // size).tolist()]


def find_grid(
    weight: Tensor, scheme: WeightScheme, search: int = 0, shrink: float = 0.6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Stored scale (R, G) and zero point (R, G) float32 of weight (R, C).

    search: number of ranges tried, by squared error, between shrink times the full range and the full range; 0 takes
    the full range. Where the range is large for the root mean square of the group, smaller ranges are tried, too.
    Grids may try other ranges, see WeightScheme.factors. dtype: of the checkpoint; None is that of the weight.
    """
    rows, columns = weight.shape
    scheme = scheme.bound(weight)
    tile = scheme.block_rows
    step = -(-rows_at_once(weight, columns, by_kernel=True) // tile) * tile
    slabs = (weight[begin : begin + step].float() for begin in range(0, rows, step))
    parts = [
        _search(slab.reshape(len(slab), -1, scheme.columns(columns)), scheme, search, shrink, dtype or weight.dtype)
        for slab in slabs
    ]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _search(
    groups: Tensor, scheme: WeightScheme, search: int, shrink: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Zero stays in range, so that a pruned weight is represented exactly.
    low = over_rows(groups.amin(-1).clamp(max=0), scheme.block_rows, Tensor.amin)
    high = over_rows(groups.amax(-1).clamp(min=0), scheme.block_rows, Tensor.amax)
    best_scale, best_zero = scheme.of_range(low, high, dtype)
    if not search:
        return scheme.stored_scale(best_scale, dtype), best_zero
    best = _loss(groups, best_scale, best_zero, scheme)
    for factor in scheme.factors(search, shrink):
        scale, zero = scheme.of_range(low, high, dtype, factor)
        loss = _loss(groups, scale, zero, scheme)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    _search_below(groups, scheme, shrink, dtype, best, best_scale, best_zero)
    return scheme.stored_scale(best_scale, dtype), best_zero


def _search_below(
    groups: Tensor, scheme: WeightScheme, shrink: float, dtype: torch.dtype, best: Tensor, scales: Tensor, zeros: Tensor
) -> None:
    """Clip weights below shrink times the largest one where a group has outliers; replaces grids that are worse.

    Both ends are clipped at the same magnitude, so that outliers at one end leave the other end as it is. groups: (R,
    G, columns). best: loss so far, scales, zeros: of the best grid so far, (R, G) each, changed in place.
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    peak = torch.maximum(-low, high)
    least = scheme.least_factor(groups, peak)
    if least is None:
        return
    factor = shrink * _FINER
    while True:
        members = (least <= factor).nonzero(as_tuple=True)
        if not len(members[0]):
            return
        part, clip = groups[members], factor * peak[members]
        clipped = low[members].maximum(-clip), high[members].minimum(clip)
        for sign in (1.0, -1.0) if scheme.symmetric else (1.0,):
            scale, zero = scheme.of_range(*clipped, dtype, sign)
            loss = _loss(part, scale, zero, scheme)
            better = loss < best[members]
            best[members] = torch.where(better, loss, best[members])
            scales[members] = torch.where(better, scale, scales[members])
            zeros[members] = torch.where(better, zero, zeros[members])
        factor *= _FINER


def is_in_range(scale: Tensor, zero: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Tensor:
    """Whether every code has a finite weight of this dtype, for scales and zero points of any shape."""
    return scale.abs() * scheme.reach(zero) <= torch.finfo(dtype).max


def over_rows(values: Tensor, tile: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Values (R, …) with those of each tile of rows replaced by their reduction, such as Tensor.sum."""
    if tile == 1:
        return values
    return torch.cat([reduce(part, 0, keepdim=True).expand_as(part) for part in values.split(tile)])


def _loss(groups: Tensor, scale: Tensor, zero: Tensor, scheme: WeightScheme) -> Tensor:
    """Squared error of the weights that share a scale, for each row and group."""
    return over_rows(losses(groups, scale, zero, scheme.points), scheme.block_rows, Tensor.sum)
