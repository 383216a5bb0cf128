"""Dequantization in plain torch."""

from torch import Tensor


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Weight (R, C) in the dtype of scale; see hasten.kernels.dequantize.dequantize."""
    groups = codes.unflatten(1, (scale.shape[1], -1)).float()
    return (groups.sub_(zero_point.float()[..., None]).mul_(scale.float()[..., None])).flatten(1).to(scale.dtype)
