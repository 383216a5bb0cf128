"""Grids of floats: FP8 (e4m3) and FP4 (e2m1), with scales by tensor, row, group or block.

Sources: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3); OCP Microscaling Formats (MX) v1.0, 2023 (e2m1, and scales
that are powers of two, e8m0); NVIDIA's NVFP4, groups of 16 whose FP8 scales are relative to one float32 scale of the
layer; DeepSeek-AI 2024, arXiv:2412.19437 (FP8 in blocks of 128x128).
Departs from MX: the power of two is rounded up where a group's largest magnitude is at 7/8 or more of the next one, as
 compressed-tensors does, because it would be clipped by up to a quarter otherwise.
"""

from dataclasses import dataclass, replace
from math import ceil, floor, log2
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.quantizers.base import WeightScheme, smallest_scale
from hasten.accel.errors import UserError
from hasten.kernels.grid_rounding import decode
from hasten.kernels.grid_rounding.reference import E4M3, LARGEST, Points

E8M0 = torch.float8_e8m0fnu
# Smallest and largest numbers of e4m3 and of the powers of two that are scales.
_SMALLEST_E4M3 = 2.0**-9
_EXPONENTS = (-126, 127)
_BLOCK = 128
# Shares of a group's range that e2m1 is tried at; more of them make hardly less error. Between 1.07 and 1.25 the
# largest magnitude comes to lie near 5, in the middle of the widest gap.
_NEXT_TO_PLAIN = [0.87, 0.93, 1.07, 1.25, 1.35, 1.45, 1.55, 1.65]
_SEARCHED = 8
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


@dataclass(frozen=True)
class FloatScheme(WeightScheme):
    """Grid of floats of a layer.

    bits: 8 is e4m3, 4 is e2m1. strategy: what shares a scale; `block` are blocks of 128x128 weights. group_size: input
    columns that share a scale, -1 for all of them. scale_format: how scales are stored: `plain` in the checkpoint's
    dtype, `power_of_two` in 8 bits, or, with tensor_group, `fp8`. layers_scale: with the strategy `tensor` the scale of
    all layers that a server fuses; with tensor_group the float32 number that FP8 scales are divided by, which
    compressed-tensors calls the global scale; None until the layers' weights are known.
    """

    bits: int = 8
    strategy: str = "channel"
    group_size: int = -1
    scale_format: str = "plain"
    layers_scale: float | None = None

    kind: ClassVar[str] = "float"

    def __post_init__(self) -> None:
        if self.bits not in LARGEST:
            raise UserError(f"bits={self.bits} of floats are out of range: 4 or 8")
        if self.strategy not in _STRATEGIES:
            raise UserError(f"strategy={self.strategy!r} is none of {', '.join(_STRATEGIES)}")
        if (self.strategy == "tensor_group") != (self.scale_format == "fp8"):
            raise UserError(f"strategy={self.strategy!r} does not go with scale_format={self.scale_format!r}")

    @property
    def block_rows(self) -> int:
        """128 in blocks."""
        return _BLOCK if self.strategy == "block" else 1

    @property
    def is_shared(self) -> bool:
        """With a scale of the whole tensor, and with scales relative to one."""
        return self.strategy in ("tensor", "tensor_group")

    def of_layers(self, peak: float) -> "FloatScheme":
        """The largest magnitude is the largest value, and, with tensor_group, its group has the largest FP8 scale."""
        if not self.is_shared:
            return self
        largest = LARGEST[self.bits]
        if self.strategy == "tensor":
            return replace(self, layers_scale=peak / largest)
        inverse = torch.tensor(LARGEST[8] * largest / peak if peak > 0 else 1.0, dtype=torch.float32)
        return replace(self, layers_scale=float(inverse.clamp_(max=torch.finfo(torch.float32).max)))

    def of_one_group(self) -> "FloatScheme":
        """The scheme with a scale a row."""
        return replace(self, group_size=-1)

    def stored_bits(self, rows: int, columns: int, itemsize: int) -> int:
        """Codes and scales; with tensor_group also the float32 that all scales are relative to."""
        scales = 1 if self.strategy == "tensor" else ceil(rows / self.block_rows) * (columns // self.columns(columns))
        if self.scale_format == "plain":
            return rows * columns * self.bits + scales * 8 * itemsize
        return rows * columns * self.bits + scales * 8 + (32 if self.strategy == "tensor_group" else 0)

    @property
    def points(self) -> Points:
        """Floats of so many bits."""
        return Points("float", self.bits)

    def reach(self, zero: Tensor) -> float:
        """448 or 6."""
        return LARGEST[self.bits]

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Weight (R, C)."""
        groups = codes.unflatten(1, (scale.shape[1], -1))
        return decode(groups, self.scales(scale), None, self.points, self.value_dtype(scale.dtype)).flatten(1)

    def value_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of plain scales; compressed-tensors unpacks the others in bfloat16."""
        return dtype if self.scale_format == "plain" else torch.bfloat16

    def of_range(self, low: Tensor, high: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """The scale at which the largest magnitude is the largest value; there is no zero point."""
        peak = torch.maximum(-low, high)
        if self.strategy == "tensor":
            assert self.layers_scale is not None
            exact = torch.full_like(peak, self.layers_scale)
        elif self.scale_format == "power_of_two":
            fraction, exponent = torch.frexp(peak)
            exponent = exponent - 1 + (fraction >= 7 / 8).int() - floor(log2(LARGEST[self.bits]))
            exact = torch.ldexp(torch.full_like(peak, factor), exponent.clamp_(*_EXPONENTS))
        else:
            exact = peak * (factor / LARGEST[self.bits])
        scale = self.scales(self.stored_scale(exact, dtype))
        if self.scale_format == "plain":
            info = torch.finfo(dtype)
            # A group of zeros has the range 0, but no scale may be zero; in float16 the largest value must be finite.
            limit = float(torch.tensor(info.max * (1 - info.eps) / LARGEST[self.bits]).to(dtype))
            scale = scale.clamp_(smallest_scale(dtype), limit)
        return scale, torch.zeros_like(scale)

    @property
    def searched(self) -> int:
        """A few: unlike those of integers, scales next to the usual one round better and clip nothing."""
        return _SEARCHED

    def factors(self, search: int, shrink: float) -> list[float]:
        """Shares that are worth a trial; shrink is not read, and of 4 bits they are the same for every search above 0.

        Of the values of e2m1 the largest two are 4 and 6: scales of about 1.5 times the usual one move a group's
        largest magnitude from 6 to 4, next to which values are denser (Cook et al. 2025, arXiv:2512.02010). On e4m3,
        scales that differ by a power of two round alike, and clipping costs more than it gains, because values are
        denser near zero. So scales of up to twice the usual one are tried, which shift the largest weights among the
        values.
        """
        if not search or self.strategy == "tensor":
            return []
        if self.bits == 8:
            return [] if self.scale_format == "power_of_two" else [1 + index / search for index in range(1, search)]
        return [2.0, 0.5, 0.25] if self.scale_format == "power_of_two" else _NEXT_TO_PLAIN

    def stored_scale(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """In the checkpoint's dtype, in e4m3 relative to that of the layers, or as a power of two."""
        if self.scale_format == "plain":
            return scale.to(dtype)
        if self.scale_format == "fp8":
            assert self.layers_scale is not None
            return (scale * self.layers_scale).clamp(_SMALLEST_E4M3, LARGEST[8]).to(E4M3)
        fraction, exponent = torch.frexp(scale)
        # The nearer one of the two powers; frexp's fractions are from 1/2 to 1.
        exponent = exponent - 1 + (fraction > 3 / 4).int()
        return torch.ldexp(torch.ones_like(scale), exponent.clamp_(*_EXPONENTS)).to(E8M0)

    def scales(self, stored: Tensor) -> Tensor:
        """Scales, float32, from stored ones."""
        if self.scale_format != "fp8":
            return stored.float()
        assert self.layers_scale is not None
        return stored.float() / self.layers_scale
