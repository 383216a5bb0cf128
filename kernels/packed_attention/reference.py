"""Attention over packed keys and values in torch: they are unpacked whole."""

import torch
from torch import Tensor

from hasten.kernels.attention.contract import Partial
from hasten.kernels.quantize_pack import Packed
from hasten.kernels.quantize_pack.reference import unpack_dequantize


def packed_attention(queries: Tensor, keys: Packed, values: Packed, scale: float, cap: float | None) -> Partial:
    """See hasten.kernels.packed_attention.packed_attention."""
    heads = len(queries)
    dense_keys = unpack_dequantize(keys).float().unflatten(1, (heads, -1)).transpose(0, 1)
    dense_values = unpack_dequantize(values).float().unflatten(0, (-1, heads)).transpose(0, 1)
    scores = queries * scale @ dense_keys.mT
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    largest = scores.amax(-1)
    weights = (scores - largest[..., None]).exp()
    return Partial(weights @ dense_values, largest, weights.sum(-1))
