"""Definition of rounding to the values of a grid, in plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# Largest values by the bits of a float.
LARGEST = {8: 448.0, 4: 6.0}
# Values of the codes 0 to 7 of e2m1; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Smallest normal number by the bits of a float, and the bits of its mantissa.
_NORMAL = {8: 2.0**-6, 4: 1.0}
_MANTISSA = {8: 3, 4: 1}
# Of a float32.
_EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class Points:
    """Values that codes stand for, before they are scaled.

    kind: `int`, whole numbers from 0 to 2 ** bits - 1 less a zero point; `float`, e4m3 of 8 bits or e2m1 of 4, whose
    codes are their bits.
    """

    kind: str
    bits: int

    @property
    def top(self) -> float:
        """The largest code of integers, the largest value of floats."""
        return LARGEST[self.bits] if self.kind == "float" else 2.0**self.bits - 1


def nearest(values: Tensor, zero: Tensor | None, points: Points) -> Tensor:
    """Nearest values to those given, which are overwritten, float32; of two at the same distance the even one."""
    if points.kind == "float":
        return nearest_float(values, points.bits)
    codes = values if zero is None else values.add_(zero)
    codes.round_().clamp_(0, points.top)
    return codes if zero is None else codes.sub_(zero)


def nearest_float(values: Tensor, bits: int) -> Tensor:
    """Nearest floats of 8 or 4 bits; beyond the largest one, that. values: float32, overwritten."""
    values.clamp_(-LARGEST[bits], LARGEST[bits])
    # Of a float32, the sum with 1.5 * 2**23 steps is rounded to whole steps, ties to even. The step is that of the
    # value's exponent. A cast to e4m3 and back takes four times as long, because CPUs do not do it in vectors.
    exponents = values.view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32)
    steps = exponents.clamp_(min=_NORMAL[bits]).mul_(1.5 * 2.0 ** (23 - _MANTISSA[bits]))
    return values.add_(steps).sub_(steps)


def encode_(values: Tensor, zero: Tensor, points: Points, codes: Tensor) -> Tensor:
    """The same, and their codes in `codes` uint8. zero: of integers, any numbers."""
    if points.kind == "float":
        codes.copy_(codes_of(nearest_float(values, points.bits), points.bits))
        return values
    codes.copy_(values.add_(zero).round_().clamp_(0, points.top))
    return values.sub_(zero)


def codes_of(values: Tensor, bits: int) -> Tensor:
    """Codes uint8 of values that are floats of 8 or 4 bits; those of 0 and of -0 are the same of 4 bits."""
    if bits == 8:
        return values.to(E4M3).view(torch.uint8)
    magnitude = values.abs()
    codes = torch.minimum(torch.minimum(2 * magnitude, 2 + magnitude), 4 + magnitude / 2)
    return codes.add_((values < 0).float(), alpha=8).to(torch.uint8)


def values_of(codes: Tensor, zero: Tensor | None, points: Points) -> Tensor:
    """Values float32 of codes uint8; for zero see nearest."""
    if points.kind == "int":
        return codes.float() if zero is None else codes - zero
    if points.bits == 8:
        table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(E4M3).float()
    else:
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    # A third or a quarter of the time of an indexed table, and of a cast, neither of which CPUs do in vectors.
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def losses(groups: Tensor, scale: Tensor, zero: Tensor | None, points: Points) -> Tensor:
    """See hasten.kernels.grid_rounding.losses."""
    scale, zero = scale[..., None], None if zero is None else zero[..., None]
    error = nearest(groups / scale, zero, points).mul_(scale).sub_(groups)
    return error.square_().sum(-1)


def encode(groups: Tensor, scale: Tensor, zero: Tensor | None, points: Points) -> Tensor:
    """See hasten.kernels.grid_rounding.encode."""
    values = groups / scale[..., None]
    if points.kind == "float":
        return codes_of(nearest_float(values, points.bits), points.bits)
    values = values if zero is None else values.add_(zero[..., None])
    return values.round_().clamp_(0, points.top).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, points: Points, dtype: torch.dtype) -> Tensor:
    """See hasten.kernels.grid_rounding.decode."""
    values = values_of(codes, None if zero is None else zero[..., None], points)
    return values.mul_(scale[..., None]).to(dtype)


def round_scaled(x: Tensor, scale: Tensor, kind: str, bits: int, low: float, high: float) -> Tensor:
    """See hasten.kernels.grid_rounding.round_scaled."""
    quotients = (x / scale).clamp(low, high)
    if kind == "int":
        return (quotients.round() * scale).to(x.dtype)
    # The sign of zeros is kept, as by a cast.
    rounded = nearest_float(quotients.to(torch.float32, copy=True), bits).copysign_(quotients)
    return (rounded.to(quotients.dtype) * scale).to(x.dtype)


def absmax(x: Tensor) -> Tensor:
    """Largest magnitude (..., 1) of x (..., C)."""
    return x.abs().amax(-1, keepdim=True)
