"""RMS norm and quantization as a Triton kernel. Imported only on first use, because importing triton takes seconds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.norm_quantize.reference import Normalised
from hasten.kernels.triton_rows import scale_of, store_codes, warps_of


def norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Normalised:
    """See hasten.kernels.norm_quantize.norm_quantize."""
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    values = torch.empty(rows, columns, dtype=dtype or x.dtype, device=x.device)
    scale = None if dtype is None else torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    summed = None if residual is None else torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(columns)
    kernel[(rows,)](
        x,
        residual,
        weight.contiguous(),
        values,
        scale,
        summed,
        columns,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        block,
        num_warps=warps_of(block),
    )
    return Normalised(values, scale, summed)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    values,
    scale,
    summed,
    columns,
    x_stride,
    residual_stride,
    eps,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program handles one row, which it keeps in registers. residual and summed, and scale, may be None."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        wide += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(summed.dtype.element_ty)
        tl.store(summed + row * columns + column, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide) / columns + eps)
    norm = wide * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    target = values + row * columns + column
    if scale is None:
        tl.store(target, norm.to(values.dtype.element_ty), mask=inside)
    else:
        absmax = tl.max(tl.abs(norm))
        store_codes(target, norm, absmax, inside)
        tl.store(scale + row, scale_of(values, absmax))
