"""compressed-tensors `pack-quantized`: integer codes packed into int32 words, as transformers and vLLM read them.

Source: github.com/vllm-project/compressed-tensors, whose own function packs. It is imported inside functions: the
machines of the GPU checks do not have the library, and write no checkpoint.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from hasten.accel.compression.formats.base import SHAPE, Packing, StoredTensor
from hasten.accel.compression.quantizers.base import QuantizedWeight, WeightScheme

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PackQuantized(Packing):
    """It stores signed codes: code minus 2**(bits - 1)."""

    name: str = "pack-quantized"

    def tensors(self, scheme: WeightScheme, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """Codes in 32-bit words, each row padded to whole words; zero points likewise, padded for each group."""
        groups = columns // scheme.columns(columns)
        tensors = [
            SHAPE,
            StoredTensor("weight_packed", torch.int32, (rows, ceil(columns * scheme.bits / 32))),
            StoredTensor("weight_scale", dtype, (rows, groups)),
        ]
        if not scheme.symmetric:
            words = zero_point_words(rows, groups, scheme.bits)
            tensors.append(StoredTensor("weight_zero_point", torch.int32, (words, groups)))
        return tensors

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """`weight_packed`, `weight_scale`, `weight_shape` and, on asymmetric grids, `weight_zero_point`."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        bits = weight.scheme.bits
        stored = {
            # In pieces, because packing needs several times the memory of the codes.
            "weight_packed": torch.cat(
                [pack_to_int32(signed(part, bits), bits) for part in weight.codes.split(_ROWS_AT_ONCE)]
            ),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if not weight.scheme.symmetric:
            rows, groups = weight.zero_point.shape
            packed = pack_to_int32(signed(weight.zero_point, bits), bits, packed_dim=0)
            missing = zero_point_words(rows, groups, bits) - len(packed)
            stored["weight_zero_point"] = torch.nn.functional.pad(packed, (0, 0, 0, missing))
        return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}


def zero_point_words(rows: int, groups: int, bits: int) -> int:
    """Words of the packed zero points of one column of groups, for rows with several groups each."""
    words = ceil(rows * bits / 32)
    # compressed-tensors 0.20 reads the bytes of the transposed words, which fails for a single row of 4-bit ones.
    return 2 if words == 1 and bits == 4 and groups > 1 else words


def signed(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 around 0."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
