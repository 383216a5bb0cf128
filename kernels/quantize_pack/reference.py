"""Quantization and packing in plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.packed_weight import pack_codes, unpack_codes

# Dimension along which the elements of a group are adjacent.
AXES = {"token": 1, "channel": 0}


@dataclass(frozen=True)
class Packed:
    """Values (R, C) as codes: code * scale + offset, or (code - 2**(bits - 1)) * scale without offset.

    words: int32 (R, ceil(C * bits / 32)). scale, offset: (R, groups) if axis is "token", (groups, C) if "channel".
    """

    words: Tensor
    scale: Tensor
    offset: Tensor | None
    columns: int
    bits: int
    axis: str

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
    step = torch.maximum(high, -low) * (2 / top) if symmetric else (high - low) / top
    # A group of equal numbers has the smallest normal scale, so that it can be divided by.
    scale = step.clamp(min=torch.finfo(x.dtype).tiny).to(x.dtype)
    # Codes are those of the rounded scale.
    offset = -(2.0 ** (bits - 1)) * scale.to(wide) if symmetric else low
    codes = ((groups - offset.unsqueeze(dim + 1)) / scale.to(wide).unsqueeze(dim + 1)).round().clamp(0, top)
    words = pack_codes(codes.flatten(dim, dim + 1).int(), bits)
    return Packed(words, scale, None if symmetric else low.to(x.dtype), x.shape[1], bits, axis)


def unpack_dequantize(packed: Packed) -> Tensor:
    """See hasten.kernels.quantize_pack.unpack_dequantize."""
    dtype, dim = packed.scale.dtype, AXES[packed.axis]
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack_codes(packed.words, packed.bits, packed.columns).to(wide).unflatten(dim, (-1, packed.group_size))
    scale = packed.scale.to(wide).unsqueeze(dim + 1)
    if packed.offset is None:
        values = (codes - 2 ** (packed.bits - 1)) * scale
    else:
        values = codes * scale + packed.offset.to(wide).unsqueeze(dim + 1)
    return values.flatten(dim, dim + 1).to(dtype)
