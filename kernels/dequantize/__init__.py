"""Dequantization of integer codes with a scale and a zero point per group: (code - zero_point) * scale."""

from torch import Tensor

from hasten.kernels.dequantize import reference
from hasten.kernels.dispatch import use_triton


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Weight (R, C) in the dtype of scale, rounded once from float32.

    codes: (R, C) uint8. scale: (R, G), any float dtype. zero_point: (R, G) uint8. C / G columns share a scale.
    """
    if use_triton(codes):
        # Imported here because importing triton takes seconds, and most processes have no GPU.
        from hasten.kernels.dequantize import triton_kernel

        return triton_kernel.dequantize(codes, scale, zero_point)
    return reference.dequantize(codes, scale, zero_point)
