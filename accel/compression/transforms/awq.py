"""AWQ: scale up the weights that large inputs meet, so that rounding them costs less of the output.

Source: Lin et al. 2023, arXiv:2306.00978. The scale of a channel is a power of its mean input magnitude; the exponent
is the one of least output error on a grid between 0 and 1.
Departs from it: the output error is measured on the Hessian, tr(dW H dWᵀ), which is exact for linear layers and needs
no further run of the block. Errors of layers with the same input are relative to their outputs, where the authors run
the module around them: else queries and keys, which are large, would choose for the values. Also tried, as in the
authors' code, are scales divided by a power of the weights' own mean magnitude. Values read by several query heads
share a scale, so that the output projection is scaled in grouped attention, too. Ranges are clipped by the quantizer's
own search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.transforms.base import BlockView, GroupInputs
from hasten.accel.compression.transforms.scaling import ScalingTransform, SiteInputs
from hasten.accel.costs.estimate import Work
from hasten.accel.costs.method import LayerStack, rounding
from hasten.accel.errors import UserError

_LEAST = 1e-4


@dataclass(frozen=True)
class AWQ(ScalingTransform):
    """Scales of least output error at the layers' level, for a database at its reference level.

    grid: number of exponents above 0, equally spaced up to 1; the exponent 0 is no scale at all. by_weight: whether
    scales divided by the weights' magnitudes are tried, too.
    """

    grid: int = 20
    by_weight: bool = True

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UserError(f"transform.awq.grid={self.grid} is out of range: 1 or more")

    def scale(self, view: BlockView, inputs: SiteInputs) -> Tensor | None:
        """The scale of least error; None where no scale has less than none."""
        weights = {
            layer.name: view.tensor(f"{layer.name}.weight") for group, _ in inputs.groups for layer in group.layers
        }
        powers = _powers(inputs, weights)
        best, least = None, self._error(view, inputs, weights, powers, None)
        for scale in self._candidates(inputs, weights):
            error = self._error(view, inputs, weights, powers, inputs.site.expanded(scale))
            if error < least:
                best, least = scale, error
        return best

    def cost(self, groups: Sequence[Group], gpu_memory: int = 0) -> Work:
        """For every candidate a rounding of all weights, and the power of their errors."""
        total = Work()
        for group in groups:
            layers = LayerStack(sum(layer.rows for layer in group.layers), group.columns, gpu_memory)
            one = rounding(layers) + Work(flops=layers.weights * layers.columns, elements=6.0 * layers.weights)
            total += one * (1 + self.grid * (2 if self.by_weight else 1))
        return total

    def _candidates(self, inputs: SiteInputs, weights: dict[str, Tensor]) -> Iterator[Tensor]:
        mean = inputs.mean().clamp(min=_LEAST)
        exponents = [index / self.grid for index in range(1, self.grid + 1)]
        for exponent in exponents:
            yield _normalised(mean**exponent)
        if self.by_weight:
            magnitude = _weight_magnitude(inputs, weights)
            for exponent in exponents:
                yield _normalised(mean**exponent / (magnitude ** (1 - exponent) + _LEAST))

    @staticmethod
    def _error(
        view: BlockView, inputs: SiteInputs, weights: dict[str, Tensor], powers: dict[str, float], scale: Tensor | None
    ) -> float:
        """Sum over the kinds of layers of the output error, relative to their output. scale: (C,), None for none."""
        total = 0.0
        for group, statistics in inputs.groups:
            own = {layer.name: weights[layer.name] for layer in group.layers}
            scaled = own if scale is None else {name: weight * scale for name, weight in own.items()}
            for name, rounded in view.rounded(group, scaled).items():
                difference = (rounded if scale is None else rounded / scale) - own[name]
                total += _output(statistics, difference) / (powers[_kind(name)] or 1.0)
        return total


def _kind(name: str) -> str:
    """Kind of a layer, which all experts share."""
    return name.rpartition(".")[2]


def _output(statistics: GroupInputs, weight: Tensor) -> float:
    """Squared output of a weight, summed over the tokens."""
    return float(statistics.power(weight).double().sum()) * statistics.tokens


def _powers(inputs: SiteInputs, weights: dict[str, Tensor]) -> dict[str, float]:
    """Squared output of the layers of each kind."""
    powers: dict[str, float] = {}
    for group, statistics in inputs.groups:
        for layer in group.layers:
            kind = _kind(layer.name)
            powers[kind] = powers.get(kind, 0.0) + _output(statistics, weights[layer.name])
    return powers


def _normalised(scale: Tensor) -> Tensor:
    """The scale with a geometric mean of its extremes of 1, so that weights keep their order of magnitude."""
    scale = scale.clamp(min=_LEAST)
    return scale / (scale.max() * scale.min()).sqrt()


def _weight_magnitude(inputs: SiteInputs, weights: dict[str, Tensor]) -> Tensor:
    """Mean magnitude of every channel's weights, relative to the largest of the weights that share a scale, (S,)."""
    total, rows = torch.zeros(()), 0
    for group, _ in inputs.groups:
        scheme = group.level.loader_scheme
        for layer in group.layers:
            size = layer.columns if scheme is None else scheme.weights.columns(layer.columns)
            grouped = weights[layer.name].abs().unflatten(1, (-1, size))
            relative = grouped / (grouped.amax(-1, keepdim=True) + 1e-6)
            total, rows = total + relative.flatten(1).sum(0), rows + layer.rows
    return inputs.site.reduced(total / rows, lambda values: values.mean(-1))
