"""Codes back to weights: (code - zero_point) * scale, group by group."""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_triton


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Weight (R, C) in the dtype of the scale, from codes (R, C) uint8, scale (R, G) and zero_point (R, G) uint8."""
    launch = _launch if use_triton(codes) else reference
    return launch(codes, scale, zero_point)


def reference(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The same in torch: the product is rounded once, from float32."""
    groups = codes.unflatten(1, (scale.shape[1], -1)).float()
    return (groups.sub_(zero_point.float()[..., None]).mul_(scale.float()[..., None])).flatten(1).to(scale.dtype)


def _launch(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    import triton

    from hasten.kernels.dequantize.triton_kernel import kernel

    rows, columns = codes.shape
    groups = scale.shape[1]
    out = torch.empty(rows, columns, dtype=scale.dtype, device=codes.device)
    block = min(1024, triton.next_power_of_2(columns))
    kernel[(rows, triton.cdiv(columns, block))](
        codes.contiguous(), scale.contiguous(), zero_point.contiguous(), out, columns, groups, columns // groups, block
    )
    return out
