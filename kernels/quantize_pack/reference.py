"""Quantization and packing in plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.packed_weight import pack_codes, unpack_codes

# Dimension along which the elements of a group are adjacent.
AXES = {"token": 1, "channel": 0}
# Scales and offsets are as narrow for wide values: what a group of 32 codes of 4 bits saves, two float32 numbers would
# cost half of.
GRID = torch.float16
# Of scales, the least positive number: a group of equal numbers is divided by it.
LEAST = torch.finfo(GRID).smallest_normal * torch.finfo(GRID).eps
LARGEST = torch.finfo(GRID).max


@dataclass(frozen=True)
class Packed:
    """Values (R, C) as codes: code * scale + offset, or (code - 2**(bits - 1)) * scale without offset.

    words: int32 (R, ceil(C * bits / 32)). scale, offset: float16, (R, groups) if axis is "token", (groups, C) if
    "channel". dtype: of the values.
    """

    words: Tensor
    scale: Tensor
    offset: Tensor | None
    columns: int
    bits: int
    axis: str
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Columns or rows that share a scale."""
        if self.axis == "token":
            return self.columns // self.scale.shape[1]
        return self.words.shape[0] // self.scale.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.words.nbytes + self.scale.nbytes + (0 if self.offset is None else self.offset.nbytes)


def quantize_pack(x: Tensor, bits: int, axis: str, group_size: int, symmetric: bool) -> Packed:
    """See hasten.kernels.quantize_pack.quantize_pack."""
    dim = AXES[axis]
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(wide).unflatten(dim, (-1, group_size))
    top = 2**bits - 1
    low, high = groups.amin(dim + 1), groups.amax(dim + 1)
    # Codes are those of the rounded scale and of the rounded offset, whose rounding then shifts no value.
    start = low.clamp(-LARGEST, LARGEST).to(GRID)
    step = torch.maximum(high, -low) * (2 / top) if symmetric else (high - start.to(wide)) / top
    scale = step.clamp(LEAST, LARGEST).to(GRID)
    offset = -(2.0 ** (bits - 1)) * scale.to(wide) if symmetric else start.to(wide)
    codes = ((groups - offset.unsqueeze(dim + 1)) / scale.to(wide).unsqueeze(dim + 1)).round().clamp(0, top)
    words = pack_codes(codes.flatten(dim, dim + 1).int(), bits)
    return Packed(words, scale.contiguous(), None if symmetric else start.contiguous(), x.shape[1], bits, axis, x.dtype)


def unpack_dequantize(packed: Packed) -> Tensor:
    """See hasten.kernels.quantize_pack.unpack_dequantize."""
    dim = AXES[packed.axis]
    wide = torch.promote_types(packed.dtype, torch.float32)
    codes = unpack_codes(packed.words, packed.bits, packed.columns).to(wide).unflatten(dim, (-1, packed.group_size))
    scale = packed.scale.to(wide).unsqueeze(dim + 1)
    if packed.offset is None:
        values = (codes - 2 ** (packed.bits - 1)) * scale
    else:
        values = codes * scale + packed.offset.to(wide).unsqueeze(dim + 1)
    return values.flatten(dim, dim + 1).to(packed.dtype)
