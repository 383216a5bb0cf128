"""Weights of 8- and 4-bit floats, as compressed-tensors stores them.

`float-quantized`: e4m3 with a scale per tensor, per row, or per block of 128 by 128. `mxfp4-pack-quantized`: e2m1, a
scale of 8 exponent bits (e8m0) per 32 columns. `nvfp4-pack-quantized`: e2m1, a scale in e4m3 per 16 columns, and a
float32 scale of the tensor by which the others are divided. Two codes of 4 bits make a byte, the even column in the low
half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.grid_rounding.reference import E2M1, Points, values_of

BLOCK = 128
MX_GROUP, NV_GROUP = 32, 16


@dataclass(frozen=True)
class FloatWeight:
    """Weight (R, C) as small floats and scales; the scales tell the format.

    codes: float8_e4m3fn (R, C), or uint8 (R, C / 2) in 4 bits. scale: with 8 bits any float dtype, (1, 1), (R, 1) or
    (R / 128, C / 128) rounded up; uint8 (R, C / 32) for MXFP4; float8_e4m3fn (R, C / 16) for NVFP4, with global_scale
    float32 of one element.
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype not in (torch.float8_e4m3fn, torch.uint8):
            raise ValueError(f"codes are {self.codes.dtype}: use float8_e4m3fn, or uint8 with two codes of 4 bits")
        rows, columns = self.shape
        group = MX_GROUP if self.global_scale is None else NV_GROUP
        if self.codes.dtype == torch.uint8 and columns % group:
            raise ValueError(f"{columns} columns of 4-bit codes must be a multiple of the group of {group}")
        if self.codes.dtype == torch.float8_e4m3fn:
            accepted = [(1, 1), (rows, 1), (-(-rows // BLOCK), -(-columns // BLOCK))]
            typed = self.scale.dtype.is_floating_point and self.scale.dtype.itemsize > 1
        else:
            wanted = torch.uint8 if self.global_scale is None else torch.float8_e4m3fn
            accepted, typed = [(rows, columns // group)], self.scale.dtype == wanted
        if not typed or tuple(self.scale.shape) not in accepted:
            raise ValueError(
                f"scale is {self.scale.dtype} {tuple(self.scale.shape)} for codes {self.codes.dtype} of a weight of "
                f"{rows} rows and {columns} columns: accepted shapes are {', '.join(map(str, accepted))}, "
                "of a float dtype for float8_e4m3fn, of uint8 for MXFP4, of float8_e4m3fn with a global_scale for NVFP4"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return self.codes.shape[0], self.codes.shape[1] * (1 if self.codes.dtype == torch.float8_e4m3fn else 2)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.global_scale) if part is not None)


def pack_e2m1(values: Tensor) -> Tensor:
    """Bytes (R, C / 2) of values (R, C) that are exact in e2m1."""
    magnitudes = torch.tensor(E2M1, device=values.device)
    codes = torch.bucketize(values.abs().float(), magnitudes) | (values.signbit().long() << 3)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def unpack_e2m1(codes: Tensor) -> Tensor:
    """Values (R, C) float32 of bytes (R, C / 2)."""
    return values_of(torch.stack([codes & 15, codes >> 4], -1).flatten(1), None, Points("float", 4))
