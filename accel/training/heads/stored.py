"""How the weights of a head are stored: in bfloat16, or in 8 bits with a scale for each row of a matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor

BFLOAT16, INT8 = "bfloat16", "int8"
_SCALE = ".scale"
_LARGEST = 127


def to_stored(weights: Mapping[str, Tensor], store: str = BFLOAT16) -> dict[str, Tensor]:
    """The tensors of a file. With int8 a matrix (R, C) is int8, and NAME.scale (R, 1) float32; the rest is bfloat16."""
    tensors = {}
    for name, weight in weights.items():
        weight = weight.detach().cpu()
        if store == INT8 and weight.dim() == 2:
            tiny = torch.finfo(torch.float32).tiny
            scale = (weight.float().abs().amax(1, keepdim=True) / _LARGEST).clamp(min=tiny)
            tensors[name], tensors[name + _SCALE] = (weight.float() / scale).round().to(torch.int8), scale
        else:
            tensors[name] = weight.bfloat16().contiguous()
    return tensors


def from_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32 of the tensors of a file; KeyError if a scale is missing."""
    weights = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            weights[name] = tensor.float() * tensors[name + _SCALE]
        elif not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors):
            weights[name] = tensor.float()
    return weights
