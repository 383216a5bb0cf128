"""Launches the Triton kernels of packed products. Imported on first use, because importing triton takes seconds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.packed_gemm import triton_gemv, triton_matmul
from hasten.kernels.packed_gemm.choice import Configuration, Gemv, Matmul, configuration, measure, problem
from hasten.kernels.packed_gemm.layout import PackedWeight

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MAX_X_ROWS = 4
_SUM_BLOCK = 1024


def packed_gemm(x: Tensor, weight: PackedWeight, chosen: Configuration | None = None) -> Tensor:
    """Product (N, R) in the dtype of x; see hasten.kernels.packed_gemm.packed_gemm.

    weight is on the device of x. chosen: the launch configuration, on which the result depends by rounding errors; None
    for the measured or default one.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: the kernel multiplies {', '.join(map(str, DTYPES))}")
    n, (rows, columns) = len(x), weight.shape
    if n == 0 or rows == 0:
        return x.new_zeros(n, rows)
    if chosen is None:
        chosen = configuration(problem(n, rows, columns, weight.bits, x.itemsize), x.device)
    launch = _gemv if isinstance(chosen, Gemv) else _matmul
    if chosen.splits == 1:
        out = torch.empty(n, rows, dtype=x.dtype, device=x.device)
        launch(x, weight, out, chosen)  # type: ignore[arg-type]
        return out
    partial = torch.empty(chosen.splits, n, rows, dtype=torch.float32, device=x.device)
    launch(x, weight, partial, chosen)  # type: ignore[arg-type]
    return sum_splits(partial, x.dtype)


def tune(x: Tensor, weight: PackedWeight) -> Configuration:
    """Measures configurations for products of this shape on x's GPU; later calls and processes use the fastest."""

    def seconds(chosen: Configuration) -> float:
        try:
            return float(triton.testing.do_bench(lambda: packed_gemm(x, weight, chosen), 5, 20, return_mode="median"))
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    return measure(problem(len(x), *weight.shape, weight.bits, x.itemsize), x.device, seconds)


def sum_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (N, R) in dtype of partial products (S, N, R) float32, in a fixed order."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    grid = (triton.cdiv(out.numel(), _SUM_BLOCK),)
    triton_matmul.sum_splits[grid](partial, out, out.numel(), len(partial), _SUM_BLOCK)
    return out


def _grouping(weight: PackedWeight) -> tuple[int, bool]:
    """GROUP and GATHER of the kernels."""
    codes = triton_gemv.unit_codes(weight.bits)
    groups = weight.scale.shape[1]
    group_size = weight.columns if groups == 1 else weight.columns // groups
    if weight.group_index is not None:
        return group_size, True
    if groups == 1:
        return -(-weight.columns // codes), False
    return (group_size, True) if group_size % codes else (group_size // codes, False)


def _gemv(x: Tensor, weight: PackedWeight, out: Tensor, chosen: Gemv) -> None:
    n, (rows, columns) = len(x), weight.shape
    codes = triton_gemv.unit_codes(weight.bits)
    units, words = -(-columns // codes), weight.codes.shape[1]
    if columns % codes:
        x = torch.nn.functional.pad(x, (0, units * codes - columns))
    x = x.contiguous()
    dtype = DTYPES[x.dtype]
    if x.dtype != torch.float32:
        x = (x if x.data_ptr() % 8 == 0 else x.clone()).flatten().view(torch.int64)
    group, gather = _grouping(weight)
    vector = 1 if weight.bits == 3 else 4
    tile = chosen.warps * 4 * vector
    units_of_split = triton.cdiv(triton.cdiv(units, chosen.splits), tile) * tile
    x_rows = min(triton.next_power_of_2(n), _MAX_X_ROWS)
    grid = (triton.cdiv(rows, 8 * chosen.rows_of_thread), triton.cdiv(n, x_rows), chosen.splits)
    zero_point, index = weight.zero_point, weight.group_index
    triton_gemv.kernel[grid](
        x,
        weight.codes.contiguous(),
        weight.scale.contiguous(),
        weight.codes if zero_point is None else zero_point.contiguous(),
        weight.codes if index is None else index.contiguous(),
        out,
        n,
        rows,
        columns,
        units,
        words,
        weight.scale.shape[1],
        units_of_split,
        GROUP=group,
        BITS=weight.bits,
        NR=x_rows,
        RT=chosen.rows_of_thread,
        KW=chosen.warps,
        V=vector,
        ONE_SCALE=weight.scale.shape[1] == 1 or group % vector == 0,
        SYMMETRIC=zero_point is None,
        GATHER=gather,
        INDEXED=index is not None,
        EVEN=units % tile == 0
        and words == units * (3 if weight.bits == 3 else 1)
        and units_of_split * chosen.splits == units,
        DTYPE=dtype,
        num_warps=chosen.warps,
    )


def _matmul(x: Tensor, weight: PackedWeight, out: Tensor, chosen: Matmul) -> None:
    n, (rows, columns) = len(x), weight.shape
    codes = triton_gemv.unit_codes(weight.bits)
    units = -(-columns // codes)
    packed = weight.codes
    if weight.bits == 3 and packed.shape[1] % 3:
        packed = torch.nn.functional.pad(packed, (0, 3 * units - packed.shape[1]))
    group, gather = _grouping(weight)
    block_u = max(1, chosen.block_k // codes)
    units_of_split = triton.cdiv(triton.cdiv(units, chosen.splits), block_u) * block_u
    grid = (triton.cdiv(rows, chosen.block_r), triton.cdiv(n, chosen.block_n), chosen.splits)
    zero_point, index = weight.zero_point, weight.group_index
    x = x if x.stride(1) == 1 else x.contiguous()
    triton_matmul.kernel[grid](
        x,
        packed.contiguous(),
        weight.scale.contiguous(),
        packed if zero_point is None else zero_point.contiguous(),
        packed if index is None else index.contiguous(),
        out,
        n,
        rows,
        columns,
        x.stride(0),
        units,
        packed.shape[1],
        weight.scale.shape[1],
        units_of_split,
        GROUP=group,
        BITS=weight.bits,
        BLOCK_R=chosen.block_r,
        BLOCK_N=chosen.block_n,
        BLOCK_U=block_u,
        SYMMETRIC=zero_point is None,
        GATHER=gather,
        INDEXED=index is not None,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
