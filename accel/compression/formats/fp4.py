"""compressed-tensors `nvfp4-pack-quantized` and `mxfp4-pack-quantized`: two e2m1 codes in a byte, the first one low."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.compression.formats.base import Packing, StoredTensor
from hasten.accel.compression.formats.quantized import pack_scale, scale_tensor
from hasten.accel.compression.quantizers.base import QuantizedWeight, WeightScheme

_GLOBAL = "weight_global_scale"


@dataclass(frozen=True)
class PackedFP4(Packing):
    """One of the two; FP8 scales are relative to a global scale, which is stored, too."""

    name: str

    def tensors(self, scheme: WeightScheme, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """`weight_packed`, `weight_scale` and, with FP8 scales, `weight_global_scale`."""
        codes = StoredTensor("weight_packed", torch.uint8, (rows, columns // 2))
        shared = [StoredTensor(_GLOBAL, torch.float32, (1,))] if scheme.is_shared else []
        return [codes, scale_tensor(scheme, rows, columns, dtype), *shared]

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Codes, scales, and the global scale."""
        codes = weight.codes.cpu()
        stored = {"weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": pack_scale(weight)}
        if weight.scheme.layers_scale is not None:
            stored[_GLOBAL] = torch.tensor([weight.scheme.layers_scale], dtype=torch.float32)
        return stored
