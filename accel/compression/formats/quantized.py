"""compressed-tensors `int-quantized`, `float-quantized`, `naive-quantized` and `mxfp8-quantized`: 8-bit codes in bytes.

The weight has the dtype int8 or float8_e4m3fn. There is a scale for each row, group or block, or one for the tensor;
powers of two are stored as their exponent plus 127.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from hasten.accel.compression.formats.base import Packing, StoredTensor
from hasten.accel.compression.formats.pack_quantized import signed
from hasten.accel.compression.quantizers.base import QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class Quantized(Packing):
    """One of these packings, which differ in nothing but their names."""

    name: str

    def tensors(self, scheme: WeightScheme, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """`weight` and `weight_scale`."""
        weight = torch.float8_e4m3fn if scheme.kind == "float" else torch.int8
        return [StoredTensor("weight", weight, (rows, columns)), scale_tensor(scheme, rows, columns, dtype)]

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The codes themselves, and the scales."""
        codes = weight.codes.cpu()
        is_float = weight.scheme.kind == "float"
        values = codes.contiguous().view(torch.float8_e4m3fn) if is_float else signed(codes, weight.scheme.bits)
        return {"weight": values, "weight_scale": pack_scale(weight)}


def scale_tensor(scheme: WeightScheme, rows: int, columns: int, dtype: torch.dtype) -> StoredTensor:
    """The stored scales of a layer (R, C) in a checkpoint of that dtype."""
    stored = {"plain": dtype, "fp8": torch.float8_e4m3fn, "power_of_two": torch.uint8}[scheme.scale_format]
    if scheme.strategy == "tensor":
        return StoredTensor("weight_scale", stored, (1,))
    return StoredTensor("weight_scale", stored, (ceil(rows / scheme.block_rows), columns // scheme.columns(columns)))


def pack_scale(weight: QuantizedWeight) -> Tensor:
    """The scales as they are stored: of a row for all that share them, and exponents as uint8."""
    scale, scheme = weight.scale.cpu(), weight.scheme
    if scheme.strategy == "tensor":
        return scale[0, :1].clone()
    scale = scale[:: scheme.block_rows].contiguous()
    return scale.view(torch.uint8) if scheme.scale_format == "power_of_two" else scale
