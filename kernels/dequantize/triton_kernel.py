"""Dequantization as a Triton kernel. It is imported only on first use, because importing triton takes seconds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 1024


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Weight (R, C) in the dtype of scale; see hasten.kernels.dequantize.dequantize."""
    rows, columns = codes.shape
    groups = scale.shape[1]
    out = torch.empty(rows, columns, dtype=scale.dtype, device=codes.device)
    block = min(_MAX_BLOCK, triton.next_power_of_2(columns))
    kernel[(rows, triton.cdiv(columns, block))](
        codes.contiguous(), scale.contiguous(), zero_point.contiguous(), out, columns, groups, columns // groups, block
    )
    return out


@triton.jit
def kernel(codes, scale, zero_point, out, columns, groups, group_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program dequantizes BLOCK columns of one row; all tensors are contiguous."""
    # int64: a weight may have more than 2**31 elements.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    group = row * groups + column // group_size
    code = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.float32)
    step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zero_point + group, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * columns + column, ((code - zero) * step).to(out.dtype.element_ty), mask=inside)
