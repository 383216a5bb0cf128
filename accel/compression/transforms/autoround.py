"""AutoRound: rounding offsets and clipping factors of all layers of a block, learned by signed gradient descent.

Source: Cheng et al. 2023, arXiv:2309.05516. A code is round(w / s + v), with an offset v in [-1/2, 1/2] for each weight
and factors alpha, beta of both ends of each group's range. They start where a quantizer's grid is, and descend the
squared error of the block's output by the signs of their gradients; inputs are those of the quantized model, targets
the outputs of the original one.
Departs from it: the best step is that of the smallest loss relative to the loss of the same sequences at the start,
because losses of different sequences cannot be compared; factors may exceed 1, because a quantizer's grid may be
narrower than the range of the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.quantizers.base import QuantizedWeight, Scheme
from hasten.accel.errors import UserError


class _Tuned:
    """A layer's weight (R, C) float32 on a grid, with what is learned.

    start: the grid. dtype: of the stored scales.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        self._groups = weight.unflatten(1, (start.scale.shape[1], -1))  # (R, G, columns)
        self._scheme, self._dtype = start.scheme, start.scale.dtype
        self._scale, self._zero = start.scale.float()[..., None], start.zero_point.float()[..., None]
        self.offsets = torch.zeros_like(self._groups)
        self.high = torch.ones_like(self._scale)
        self.low = torch.ones_like(self._scale)
        self.parameters = [self.offsets, self.high] + ([] if self._scheme.symmetric else [self.low])

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale, rounded to the stored dtype, and zero point, (R, G, 1) each."""
        if self._scheme.symmetric:
            return self._stored(self._scale * self.high), self._zero
        top = self._scheme.top
        low, high = -self._zero * self._scale * self.low, (top - self._zero) * self._scale * self.high
        scale = self._stored((high - low) / top)
        return scale, _straight(lambda zero: zero.round().clamp(0, top), -low / scale)

    def weight(self) -> Tensor:
        """The quantized weight (R, C), whose gradients pass through all roundings."""
        scale, zero = self.grid()
        codes = _straight(torch.round, self._groups / scale + self.offsets + zero).clamp(0, self._scheme.top)
        return ((codes - zero) * scale).flatten(1)

    def quantized(self) -> QuantizedWeight:
        """Codes with scales and zero points."""
        scale, zero = self.grid()
        codes = (self._groups / scale + self.offsets + zero).round().clamp(0, self._scheme.top)
        return QuantizedWeight(
            codes.flatten(1).to(torch.uint8),
            scale[..., 0].to(self._dtype),
            zero[..., 0].to(torch.uint8),
            self._scheme,
        )

    def step(self, gradients: list[Tensor], rate: float) -> None:
        """Move all that is learned against the signs of its gradients."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.sub_(gradient.sign(), alpha=rate)
        self.offsets.clamp_(-0.5, 0.5)

    def _stored(self, scale: Tensor) -> Tensor:
        return _straight(lambda exact: exact.to(self._dtype).float(), scale)


def _straight(rounding: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """rounding(value), with the gradient of value."""
    return value + (rounding(value) - value).detach()
