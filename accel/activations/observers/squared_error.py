"""The magnitude at which rounding and clipping together have the least squared error.

Source: Nagel et al. 2021, arXiv:2106.08295, section 3.1 (MSE range).
Departs from it: the error is that of a histogram, whose bins count as a few equally likely magnitudes, and limits are
searched on a geometric grid. Only the scale of a whole tensor is searched: a global scale of NVFP4 clips nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.accel.activations.observers.base import InputObserver
from hasten.accel.activations.ranges import InputRange, bin_edges
from hasten.accel.activations.rounding import to_codes
from hasten.accel.activations.scheme import InputScheme
from hasten.accel.errors import UserError

# Magnitudes that a bin counts as.
_POINTS = 16


@dataclass(frozen=True)
class SquaredError(InputObserver):
    """Observer that clips: limits are tried down to the largest magnitude / 2**octaves, steps an octave."""

    needs_histogram: ClassVar[bool] = True

    octaves: int = 8
    steps: int = 8

    def __post_init__(self) -> None:
        if self.octaves < 1 or self.steps < 1:
            raise UserError(f"need octaves >= 1 and steps >= 1, got {self}")

    def limit(self, inputs: InputRange, scheme: InputScheme) -> float:
        """See InputObserver."""
        counts, absmax = inputs.counts, inputs.absmax
        assert counts is not None
        if not scheme.static:
            return absmax
        used = counts.nonzero()[:, 0].cpu()
        edges = bin_edges().double()
        inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
        points = edges[used, None] + (edges[used + 1] - edges[used])[:, None] * inside
        # The last bin ends at the largest magnitude.
        points = points.clamp(max=absmax)
        weights = counts.cpu()[used, None].double()
        best, least = absmax, float("inf")
        for step in range(self.octaves * self.steps + 1):
            limit = absmax * 2.0 ** (-step / self.steps)
            scale = limit / scheme.top
            rounded = to_codes((points / scale).float(), scheme).double() * scale
            error = float(((rounded - points).square() * weights).sum())
            if error < least:
                best, least = limit, error
        return best
