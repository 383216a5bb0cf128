"""AutoRound: rounding offsets and scales of all layers of a block, learned by signed gradient descent.

Source: Cheng et al. 2023, arXiv:2309.05516. A weight w on a grid with scale s is rounded at w / s + v; the offset v is
at most half a step of the grid. Both ends of each group's range are multiplied by factors. They start at offsets of 0
on the grids of a quantizer, and descend the squared error of the block's output by the signs of their gradients, for
inputs of the quantized model and outputs of the original one.
Departs from it: losses are compared relative to the loss of the same sequences at the start, because those of different
sequences cannot be compared; of the start, the best step and the last one, the best on all sequences is kept; factors
may exceed 1, because a quantizer's grid may be narrower than the range of the weights. Grids whose scales are powers of
two, or are shared by rows, keep their scales.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.quantizers.base import QuantizedWeight, Quantizer, Scheme, WeightScheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.compression.transforms.base import BlockTransform
from hasten.accel.costs.estimate import Work
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer

# Bits of the mantissa, and smallest exponent, of e4m3 and e2m1 by their bits.
_FLOATS = {8: (3, -6), 4: (1, 0)}
# Elementwise operations on a weight in a step: rounding it, its gradient, and the move. Runs of a block on all
# sequences: for losses, and for errors, with two products of each layer.
_STEP_ELEMENTS, _WHOLE_RUNS = 40, 6
# Bytes for a weight, measured on a block of 28 million: in float32 the original, its offset in four copies, and what a
# step computes of it.
_WEIGHT_BYTES = 56
# A backward costs two forwards.
_BACKWARD = 2
# The grids that tuning starts from where the quantizer needs statistics: those of least squared error.
_SEARCH = 24
_ROUNDED = RoundToNearest(search=_SEARCH, shrink=0.4)


@dataclass(frozen=True)
class AutoRound(BlockTransform):
    """Makes the codes of all layers of a block, on the grids of a quantizer that needs no statistics.

    steps: of descent. batch: sequences of a step. rate: of the first step, in steps of the grid for offsets; it falls
    linearly to 0; None is 1 / steps. seed: of the order of sequences.
    """

    steps: int = 200
    batch: int = 8
    rate: float | None = None
    seed: int = 0

    makes_edits: ClassVar[bool] = False
    needs_original: ClassVar[bool] = True
    solves_blocks: ClassVar[bool] = True
    block_bytes: ClassVar[int] = _WEIGHT_BYTES

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"transform.autoround.{name}={getattr(self, name)} is out of range: 1 or more")
        if self.rate is not None and not self.rate > 0:
            raise UserError(f"transform.autoround.rate={self.rate:g} is out of range: above 0")

    def check(self, architecture: Architecture, earlier: Sequence[BlockTransform]) -> None:
        """UserError where another transform moves the targets of layers, which a block does not have."""
        super().check(architecture, earlier)
        other = next((transform for transform in earlier if transform.needs_original), None)
        if other is not None:
            raise UserError(
                f"transforms: autoround does not go with {type(other).__name__.lower()}, because its target is already "
                "the output of the original block"
            )

    def block_cost(self, weights: int, sequences: int, run: Callable[[int], Work]) -> Work:
        """The steps, and the runs on all sequences before and after them."""
        step = run(min(self.batch, sequences)) * (1 + _BACKWARD) + Work(elements=_STEP_ELEMENTS * weights)
        search = Work(elements=_STEP_ELEMENTS * weights * _SEARCH)
        return step * self.steps + run(sequences) * _WHOLE_RUNS + search

    @torch.no_grad()
    def solve_block(
        self,
        architecture: Architecture,
        block: int,
        groups: Sequence[Group],
        quantizer: object,
        inputs: Tensor,
        targets: Tensor,
    ) -> dict[str, Result[CompressedWeight]]:
        """Compressed layers of a block by name. inputs, targets: (N, T, D), of the block and of the original block."""
        start = quantizer if isinstance(quantizer, Quantizer) and not quantizer.needs_hessian else _ROUNDED
        module = architecture.load_block(block)
        layers = {layer.module: layer for group in groups for layer in group.layers}
        tuned: dict[str, _Tuned] = {}
        for group in groups:

            def read(layer: Layer) -> Tensor:
                return architecture.checkpoint.tensor(f"{layer.name}.weight")

            solved = group.level.solve(start, group.layers, read, start.prepare(None), str(architecture.device))
            for layer in group.layers:
                quantized = solved[layer.name].weight
                assert isinstance(quantized, QuantizedWeight)
                weight = read(layer)
                tuned[layer.module] = _Tuned(weight.to(architecture.device, torch.float32), quantized, weight.dtype)
        descent = _Descent(architecture, module, block, tuned, self.batch)
        before, after = descent.run(inputs, targets, self.steps, self.rate or 1 / self.steps, self.seed)
        notes = () if after < before else ("rounding was not improved on the block's output",)
        errors = descent.errors(inputs)
        return {
            layers[path].name: Result(layer.quantized(), *errors[path], notes, of_output=True)
            for path, layer in tuned.items()
        }


class _Tuned:
    """A layer's weight (R, C) float32, and what is learned of its grid and rounding.

    start: the grid. dtype: of the checkpoint.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight, dtype: torch.dtype) -> None:
        self.original = weight
        self._scheme, self._dtype = start.scheme, dtype
        self._groups = weight.unflatten(1, (start.scale.shape[1], -1))  # (R, G, columns)
        self._start = start
        self._scale, self._zero = start.scheme.scales(start.scale)[..., None], start.zero_point.float()[..., None]
        offsets = torch.zeros_like(self._groups)
        ends = [torch.ones_like(self._scale) for _ in range(_learned_ends(start.scheme))]
        self.parameters = [offsets, *ends]

    def weight(self) -> Tensor:
        """The quantized weight (R, C), whose gradients pass through all roundings."""
        scale, zero = self._grid()
        values = _straight(lambda exact: self._scheme.nearest(exact.clone(), zero.detach()), self._values(scale, zero))
        return (values * scale).flatten(1)

    def quantized(self) -> QuantizedWeight:
        """Codes with scales and zero points."""
        scale, zero = self._grid()
        codes = torch.empty(self._groups.shape, dtype=torch.uint8, device=self._groups.device)
        self._scheme.encode(self._values(scale, zero), zero, codes)
        stored = (
            self._scheme.stored_scale(scale[..., 0], self._dtype) if len(self.parameters) > 1 else self._start.scale
        )
        return QuantizedWeight(codes.flatten(1), stored, zero[..., 0].to(torch.uint8), self._scheme)

    def step(self, gradients: Sequence[Tensor | None], rate: float) -> None:
        """Move all that is learned against the signs of its gradients; None for an expert without tokens."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(gradient.sign(), alpha=rate)
        self.parameters[0].clamp_(-0.5, 0.5)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scale, as it is stored, and zero point, (R, G, 1) float32 each."""
        ends = self.parameters[1:]
        if not ends:
            return self._scale, self._zero
        if len(ends) == 1:
            return self._stored(self._scale * ends[0]), self._zero
        assert isinstance(self._scheme, Scheme)
        top = self._scheme.top
        high, low = (top - self._zero) * self._scale * ends[0], -self._zero * self._scale * ends[1]
        scale = self._stored((high - low) / top)
        return scale, _straight(lambda zero: zero.round().clamp(0, top), -low / scale)

    def _values(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Weights divided by their scale, with offsets, within the range of the grid."""
        values = self._groups / scale
        values = values + self.parameters[0] * _steps(self._scheme, values.detach())
        if isinstance(self._scheme, Scheme):
            return values.maximum(-zero).minimum(self._scheme.top - zero)
        reach = self._scheme.reach(zero)
        assert isinstance(reach, float | int)
        return values.clamp(-reach, reach)

    def _stored(self, scale: Tensor) -> Tensor:
        def rounded(exact: Tensor) -> Tensor:
            return self._scheme.scales(self._scheme.stored_scale(exact[..., 0], self._dtype))[..., None]

        return _straight(rounded, scale)


class _Descent:
    """Tunes the layers of one block together. tuned: by path in the block."""

    def __init__(
        self, architecture: Architecture, module: nn.Module, block: int, tuned: Mapping[str, _Tuned], batch: int
    ) -> None:
        self._architecture, self._module, self._block, self._batch = architecture, module, block, batch
        self._tuned = tuned
        for path in tuned:
            # Plain attributes with a graph take their places.
            del module.get_submodule(path)._parameters["weight"]

    def run(self, inputs: Tensor, targets: Tensor, steps: int, rate: float, seed: int) -> tuple[float, float]:
        """Tune the layers; returns the mean squared error of all outputs at the start, and now."""
        generator = torch.Generator().manual_seed(seed)
        start, first = self._copy(), self._losses(inputs, targets)
        best, least = start, float("inf")
        order: list[int] = []
        for step in range(steps):
            if len(order) < min(self._batch, len(inputs)):
                order = torch.randperm(len(inputs), generator=generator).tolist()
            chosen, order = order[: self._batch], order[self._batch :]
            before = float(first[chosen].sum())
            gradients, loss = self._gradients(inputs[chosen], targets[chosen])
            ratio = loss / before if before else 0.0
            if ratio < least:
                least, best = ratio, self._copy()
            for layer in self._tuned.values():
                layer.step([gradients.pop(0) for _ in layer.parameters], rate * (1 - step / steps))
        losses = [float(first.sum())]
        candidates = [start, best, self._copy()]
        for candidate in candidates[1:]:
            self._restore(candidate)
            losses.append(float(self._losses(inputs, targets).sum()))
        self._restore(candidates[losses.index(min(losses))])
        return losses[0] / len(inputs), min(losses) / len(inputs)

    def errors(self, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean squared error of the output and mean squared output (R,) of each layer, on its inputs in this block."""
        sums: dict[str, list[Tensor]] = {}
        tokens = dict.fromkeys(self._tuned, 0)
        hooks = []
        for path, layer in self._tuned.items():
            change = layer.weight() - layer.original
            sums[path] = [torch.zeros(len(change), device=change.device) for _ in range(2)]

            def add(_: nn.Module, given: tuple[Tensor, ...], path: str = path, change: Tensor = change) -> None:
                rows = given[0].flatten(0, -2).float()
                tokens[path] += len(rows)
                for total, weight in zip(sums[path], (change, self._tuned[path].original), strict=True):
                    total += nn.functional.linear(rows, weight).square_().sum(0)

            hooks.append(self._module.get_submodule(path).register_forward_pre_hook(add))
        self._losses(inputs, inputs)
        for hook in hooks:
            hook.remove()
        return {
            path: (parts[0] / max(1, tokens[path]), parts[1] / max(1, tokens[path])) for path, parts in sums.items()
        }

    def _gradients(self, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor | None], float]:
        """Gradients of the loss of some sequences by all parameters, and the loss."""
        parameters = [parameter for layer in self._tuned.values() for parameter in layer.parameters]
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_()
            self._set_weights()
            loss = self._loss(inputs, targets, differentiable=True).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
        return list(gradients), float(loss.detach())

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the outputs of each sequence, (N,)."""
        self._set_weights()
        parts = zip(inputs.split(self._batch), targets.split(self._batch), strict=True)
        return torch.cat([self._loss(*part, differentiable=False) for part in parts]).cpu()

    def _loss(self, inputs: Tensor, targets: Tensor, differentiable: bool) -> Tensor:
        model = self._architecture
        given = inputs.to(model.device, model.dtype)
        output = model.run_block(self._module, self._block, given, differentiable)
        return (output.float() - targets.to(model.device).float()).square().mean((1, 2))

    def _set_weights(self) -> None:
        for path, layer in self._tuned.items():
            self._module.get_submodule(path).weight = layer.weight().to(self._architecture.dtype)

    def _copy(self) -> list[Tensor]:
        return [parameter.clone() for layer in self._tuned.values() for parameter in layer.parameters]

    def _restore(self, copies: Sequence[Tensor]) -> None:
        place = 0
        for layer in self._tuned.values():
            for parameter in layer.parameters:
                parameter.copy_(copies[place])
                place += 1


def _learned_ends(scheme: WeightScheme) -> int:
    """Number of ends of a group's range that are learned: both, one for both, or none."""
    if scheme.strategy not in ("channel", "group", "tensor_group") or scheme.scale_format == "power_of_two":
        return 0
    return 1 if scheme.symmetric else 2


def _steps(scheme: WeightScheme, values: Tensor) -> Tensor | float:
    """Distance of neighbouring values of a grid around values."""
    if scheme.kind == "int":
        return 1.0
    mantissa, least = _FLOATS[scheme.bits]
    return torch.exp2(values.abs().clamp(min=2.0**least).log2().floor() - mantissa)


def _straight(rounding: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """rounding(value), with the gradient of value."""
    return value + (rounding(value.detach()) - value).detach()
