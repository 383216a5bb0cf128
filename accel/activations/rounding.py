"""Rounding of activations, with the results of compressed-tensors' fake quantization to the bit.

Source: compressed-tensors 0.20 (`fake_quantize` and `compute_dynamic_scales_and_zp`), which transformers runs; the
microscaling formats by Rouhani et al. 2023, arXiv:2310.10537.
Departs from it: a dynamic scale of `token` is that of the last dimension for any number of dimensions (the library
takes one scale for all of [N, C]), and a scale is first cast to the dtype of the inputs. vLLM's dynamic 8-bit integers
have the scale max / 127, not max / 127.5: its codes differ by at most one unit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.activations.scheme import InputScheme
from hasten.kernels import grid_rounding

_FP8 = torch.float8_e4m3fn
_FP8_TOP = 448.0
# FP8 scale that takes the place of zero, as in the library.
_LEAST_FP8_SCALE = 0.125


@dataclass(frozen=True)
class InputRounding:
    """How the inputs of one layer are rounded.

    scale: (1,), or (H, 1, 1) of inputs [B, H, T, D], of a static scheme. zero_point: of the same shape, None where the
    scheme is symmetric. global_scale: (1,) float32 of `tensor_group`; group scales are divided by it.
    """

    scheme: InputScheme
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Rounded inputs [..., C]; a gradient passes as if they had not been rounded."""
        if not inputs.numel():
            return inputs
        rounded = _rounded(inputs.detach(), self)
        return inputs + (rounded - inputs.detach()) if inputs.requires_grad else rounded

    def to(self, device: torch.device) -> "InputRounding":
        """The same with its tensors on a device."""
        parts = (self.scale, self.zero_point, self.global_scale)
        return InputRounding(self.scheme, *(None if part is None else part.to(device) for part in parts))


def _rounded(inputs: Tensor, rounding: InputRounding) -> Tensor:
    scheme = rounding.scheme
    if scheme.static:
        assert rounding.scale is not None
        zero_point = None if rounding.zero_point is None else rounding.zero_point.to(inputs.dtype)
        return _on_grid(inputs, rounding.scale.to(inputs.dtype), zero_point, scheme)
    if scheme.strategy in ("group", "tensor_group"):
        groups = inputs.unflatten(-1, (-1, scheme.group_size or 0))
        scale = _group_scale(grid_rounding.absmax(groups), rounding)
        return _on_grid(groups, scale, None, scheme).flatten(-2)
    if scheme.symmetric:
        scale = _above_zero(_absmax(inputs, scheme) / _half_range(scheme))
        return _on_grid(inputs, scale, None, scheme)
    extremes = torch.aminmax(inputs) if scheme.strategy == "tensor" else torch.aminmax(inputs, dim=-1, keepdim=True)
    low, high = extremes.min.clamp(max=0), extremes.max.clamp(min=0)
    scale = _above_zero((high - low) / (2 * _half_range(scheme)))
    least = -(2.0 ** (scheme.bits - 1))
    zero_point = (least - low / scale).clamp(least, -least - 1).round()
    return _on_grid(inputs, scale, zero_point, scheme)


def _absmax(inputs: Tensor, scheme: InputScheme) -> Tensor:
    return inputs.abs().amax() if scheme.strategy == "tensor" else grid_rounding.absmax(inputs)


def _half_range(scheme: InputScheme) -> float:
    """Half the distance between the least and the largest code."""
    return scheme.top if scheme.kind == "float" else scheme.top + 0.5


def _above_zero(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)


def _group_scale(absmax: Tensor, rounding: InputRounding) -> Tensor:
    """Scales of groups whose largest magnitudes are absmax, in the dtype in which inputs are divided by them."""
    scheme = rounding.scheme
    if scheme.scale == "power_of_two":
        return power_of_two_scale(absmax, scheme)
    scale = absmax / _half_range(scheme)
    if scheme.scale == "plain":
        return _above_zero(scale)
    assert rounding.global_scale is not None
    stored = (rounding.global_scale * scale).clamp(-_FP8_TOP, _FP8_TOP).to(_FP8).to(torch.float32)
    return stored.masked_fill(stored == 0, _LEAST_FP8_SCALE) / rounding.global_scale


def power_of_two_scale(absmax: Tensor, scheme: InputScheme) -> Tensor:
    """Scale of a group of the microscaling formats from its largest magnitude, in the dtype of absmax.

    The power of two at or below absmax, from 1.75 times it on the next one, is divided by the power of two at or below
    the largest code.
    """
    exponent = (absmax.float().view(torch.int32) + (1 << 21)) >> 23
    below = {8: 8, 4: 2}[scheme.bits]
    # Stored exponents begin at 0, which stands for 2 ** -127: a subnormal number.
    stored = (exponent - below).clamp(0, 255)
    scale = torch.where(stored > 0, stored << 23, 1 << 22).to(torch.int32).view(torch.float32).to(absmax.dtype)
    return scale.masked_fill(scale == 0, 1.0)


def _on_grid(values: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: InputScheme) -> Tensor:
    """Values rounded to multiples of scale that have a code, in their dtype."""
    if zero_point is None:
        return grid_rounding.round_scaled(values, scale, scheme.kind, scheme.bits, *_ends(scheme))
    return (to_codes(values / scale + zero_point, scheme) - zero_point) * scale


def _ends(scheme: InputScheme) -> tuple[float, float]:
    """The least and the largest code."""
    return (-(2.0 ** (scheme.bits - 1)) if scheme.kind == "int" else -scheme.top), scheme.top


def to_codes(scaled: Tensor, scheme: InputScheme) -> Tensor:
    """The nearest codes of inputs that are divided by their scale, as numbers in their dtype."""
    one = torch.ones_like(scaled[..., :1])
    return grid_rounding.round_scaled(scaled, one, scheme.kind, scheme.bits, *_ends(scheme))
