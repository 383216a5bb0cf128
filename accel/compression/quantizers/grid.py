"""Scales and zero points of uniform grids, by range or by search for the least squared error.

Source: Nagel et al. 2021, arXiv:2106.08295, section 3.1 (range setting by mean squared error); Frantar et al. 2022,
arXiv:2210.17323, whose code searches shrunk ranges. Departs from them: how far a range is shrunk depends on the group,
because a group with outliers may need a tenth of its range, and most groups never less than a third.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.calibration.slabs import rows_at_once
from hasten.accel.compression.quantizers.base import QuantizedWeight, Scheme
from hasten.accel.compression.quantizers.columns import STEPS

# The smallest step that is tried, as a share of the best step for normal weights of the same root mean square. Outliers
# that raise the root mean square by more than two fifths cost more than all other weights if they are clipped.
_LEAST_STEP = 0.6
# Ratio of two ranges below the usual ones.
_FINER = 0.9


@dataclass(frozen=True)
class Grid:
    """Grid to which weights (R, C) are rounded.

    scale: (R, G) in the stored dtype. zero_point: (R, G) float32, whole numbers.
    """

    scheme: Scheme
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, weight: Tensor, scheme: Scheme, search: int = 0, shrink: float = 0.6) -> "Grid":
        """Grid for weight (R, C); search and shrink: see find_grid."""
        return cls(scheme, *find_grid(weight, scheme, search, shrink))

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Nearest codes of weight (R, C); zeros, and all values on the grid, are represented exactly."""
        groups = weight.float().unflatten(1, (self.scale.shape[1], -1))
        codes = (groups / self.scale.float()[..., None] + self.zero_point[..., None]).round().clamp(0, self.scheme.top)
        zero_point = self.zero_point.to(torch.uint8)
        return QuantizedWeight(codes.flatten(1).to(torch.uint8), self.scale, zero_point, self.scheme)

    def of_columns(self, order: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scale and zero point, (R,) float32 each, of every input column, in the given order (C,)."""
        scales, zeros = self.scale.float().T.contiguous(), self.zero_point.T.contiguous()
        size = self.scheme.columns(len(order))
        return [(scales[group], zeros[group]) for group in (order // size).tolist()]


def find_grid(weight: Tensor, scheme: Scheme, search: int = 0, shrink: float = 0.6) -> tuple[Tensor, Tensor]:
    """Scale (R, G) in the weight's dtype and zero point (R, G) float32 of weight (R, C).

    search: number of ranges tried, by squared error, between shrink times the full range and the full range; 0 takes
    the full range. Where the range is large for the root mean square of the group, smaller ranges are tried, too.
    """
    rows, columns = weight.shape
    size = scheme.columns(columns)
    groups = weight.float().reshape(rows, -1, size)
    step = rows_at_once(weight, columns)
    parts = [
        _search(groups[begin : begin + step], scheme, search, shrink, weight.dtype) for begin in range(0, rows, step)
    ]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _search(groups: Tensor, scheme: Scheme, search: int, shrink: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Zero stays in range, so that a pruned weight is represented exactly.
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best_scale, best_zero = _grid(low, high, scheme, dtype)
    if not search:
        return best_scale.to(dtype), best_zero
    best = _loss(groups, best_scale, best_zero, scheme)
    tried = [shrink + (1 - shrink) * index / search for index in range(search)]
    if scheme.symmetric:
        # A symmetric grid has one step more on its negative side; a negative scale moves that step to the positive one.
        tried += [-factor for factor in [*tried, 1.0]]
    for factor in tried:
        scale, zero = _grid(low, high, scheme, dtype, factor)
        loss = _loss(groups, scale, zero, scheme)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    _search_below(groups, scheme, shrink, dtype, best, best_scale, best_zero)
    return best_scale.to(dtype), best_zero


def _search_below(
    groups: Tensor, scheme: Scheme, shrink: float, dtype: torch.dtype, best: Tensor, scales: Tensor, zeros: Tensor
) -> None:
    """Clip weights below shrink times the largest one where a group has outliers; replaces grids that are worse.

    Both ends are clipped at the same magnitude, so that outliers at one end leave the other end as it is. groups: (R,
    G, columns). best: loss so far, scales, zeros: of the best grid so far, (R, G) each, changed in place.
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    peak = torch.maximum(-low, high)
    steps = STEPS[scheme.bits] * groups.square().mean(-1).sqrt() * _LEAST_STEP
    # A group of zeros needs no smaller range.
    least = (steps * 2 ** (scheme.bits - 1) / peak).masked_fill_(steps == 0, torch.inf)
    factor = shrink * _FINER
    while True:
        members = (least <= factor).nonzero(as_tuple=True)
        if not len(members[0]):
            return
        part, clip = groups[members], factor * peak[members]
        clipped = low[members].maximum(-clip), high[members].minimum(clip)
        for sign in (1.0, -1.0) if scheme.symmetric else (1.0,):
            scale, zero = _grid(*clipped, scheme, dtype, sign)
            loss = _loss(part, scale, zero, scheme)
            better = loss < best[members]
            best[members] = torch.where(better, loss, best[members])
            scales[members] = torch.where(better, scale, scales[members])
            zeros[members] = torch.where(better, zero, zeros[members])
        factor *= _FINER


def is_in_range(scale: Tensor, zero: Tensor, top: int, dtype: torch.dtype) -> Tensor:
    """Whether every code of 0 to top has a finite value of this dtype, for scales and zero points of any shape."""
    return scale.abs() * torch.maximum(zero, top - zero) <= torch.finfo(dtype).max


def _grid(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32, of a grid that spans factor times [low, high]; the scale is rounded to dtype.

    On symmetric grids only, factor and scale may be negative: code 0 is the value of largest magnitude.
    """
    if scheme.symmetric:
        middle = 2 ** (scheme.bits - 1)
        exact = torch.where(-low >= high, -low, -high) * (factor / middle)
        zero = torch.full_like(exact, middle)
    else:
        exact = (high - low) * (factor / scheme.top)
        zero = torch.zeros_like(exact)
    scale = exact.to(dtype).float()
    # A group of zeros has the range 0: no scale may become zero.
    scale = torch.copysign(scale.abs().clamp(min=_smallest(dtype)), scale)
    if not scheme.symmetric:
        zero = (-low * factor / scale).round().clamp(0, scheme.top)
    # In float16, a scale that is rounded up may take the value of the largest code beyond the range of numbers.
    info, reach = torch.finfo(dtype), torch.maximum(zero, scheme.top - zero)
    largest = (info.max * (1 - info.eps) / reach).to(dtype).float()
    return torch.where(is_in_range(scale, zero, scheme.top, dtype), scale, torch.copysign(largest, scale)), zero


def _smallest(dtype: torch.dtype) -> float:
    """Smallest scale above zero: float16's subnormal numbers are common, and servers compute with them."""
    info = torch.finfo(dtype)
    return float(info.tiny * info.eps if dtype == torch.float16 else info.tiny)


def _loss(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    scale, zero = scale[..., None], zero[..., None]
    codes = (groups / scale).add_(zero).round_().clamp_(0, scheme.top)
    error = codes.sub_(zero).mul_(scale).sub_(groups)
    return error.square_().sum(-1)
