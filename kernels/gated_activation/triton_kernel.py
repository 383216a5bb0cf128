"""Gated activation as Triton kernels. Imported only on first use, because importing triton takes seconds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.triton_rows import scale_of, store_codes, warps_of

_BLOCK, _QUANTIZING_BLOCK = 1024, 4096


def gated_activation(
    x: Tensor, activation: str = "silu", dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """See hasten.kernels.gated_activation.gated_activation."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape[0], x.shape[1] // 2
    values = torch.empty(rows, columns, dtype=dtype or x.dtype, device=x.device)
    gelu = activation == "gelu_tanh"
    if dtype is None:
        block = min(_BLOCK, triton.next_power_of_2(columns))
        kernel[(rows, triton.cdiv(columns, block))](x, values, columns, x.stride(0), gelu, block)
        return values, None
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(_QUANTIZING_BLOCK, triton.next_power_of_2(columns))
    # Up to 16 elements a thread, because two inputs of each are kept.
    quantizing_kernel[(rows,)](
        x, values, scale, columns, x.stride(0), gelu, block, num_warps=min(16, 2 * warps_of(block))
    )
    return values, scale


@triton.jit
def _product(x, column, columns, GELU: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """act(gate) * up, float32, of one row; 0 outside of it."""
    inside = column < columns
    gate = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + columns + column, mask=inside, other=0.0).to(tl.float32)
    # 0.5 * (1 + tanh(u)) is sigmoid(2 * u); the factor is 2 * sqrt(2 / pi).
    argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    return gate * tl.sigmoid(argument) * up


@triton.jit
def kernel(x, values, columns, stride, GELU: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program handles BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = _product(x + row * stride, column, columns, GELU)
    tl.store(values + row * columns + column, product.to(values.dtype.element_ty), mask=column < columns)


@triton.jit
def quantizing_kernel(  # type: ignore[no-untyped-def]
    x,
    values,
    scale,
    columns,
    stride,
    GELU: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program handles one row, in two passes: its maximum, then its codes. The second pass reads from the cache."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    absmax = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        absmax = tl.maximum(absmax, tl.abs(_product(x, start + tl.arange(0, BLOCK), columns, GELU)))
    largest = tl.max(absmax)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        product = _product(x, column, columns, GELU)
        store_codes(values + row * columns + column, product, largest, column < columns)
    tl.store(scale + row, scale_of(values, largest))
