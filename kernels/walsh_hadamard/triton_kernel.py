"""Walsh-Hadamard transform as a Triton kernel. Imported only on first use, because importing triton takes seconds."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.triton_rows import scale_of, store_codes, warps_of
from hasten.kernels.walsh_hadamard.reference import factors, hadamard_matrix

MAX_COLUMNS = 2**14  # a row is kept in registers
_TILE = 2048


def walsh_hadamard(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """See hasten.kernels.walsh_hadamard.walsh_hadamard."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    order, power = factors(columns)
    values = torch.empty(rows, columns, dtype=dtype or x.dtype, device=x.device)
    scale = None if dtype is None else torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if order == 1:
        tile = max(1, min(_TILE // power, triton.next_power_of_2(rows)))
        programs = triton.cdiv(rows, tile)
    else:
        tile, programs = triton.next_power_of_2(order), rows
    kernel[(programs,)](
        x,
        _matrix(order, x.device),
        values,
        scale,
        rows,
        x.stride(0),
        columns**-0.5,
        order,
        tile,
        power,
        power.bit_length() - 1,
        num_warps=max(4, warps_of(tile * power)),
    )
    return values, scale


@cache
def _matrix(order: int, device: torch.device) -> Tensor:
    return hadamard_matrix(order).to(device)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x,
    matrix,
    values,
    scale,
    rows,
    stride,
    factor,
    ORDER: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    POWER: tl.constexpr,  # noqa: N803
    STAGES: tl.constexpr,  # noqa: N803
):
    """One program handles TILE rows of POWER columns, or one row of ORDER x POWER. scale may be None."""
    column = tl.arange(0, POWER)[None, :]
    part = tl.arange(0, TILE)
    if ORDER == 1:
        row = tl.program_id(0).to(tl.int64) * TILE + part
        stored = (row < rows)[:, None]
        tile = tl.load(x + row[:, None] * stride + column, mask=stored, other=0.0).to(tl.float32)
        place = row[:, None] * POWER + column
    else:
        row = tl.program_id(0).to(tl.int64)
        stored = (part < ORDER)[:, None]
        tile = tl.zeros([TILE, POWER], tl.float32)
        for number in range(0, ORDER):
            source = tl.load(x + row * stride + number * POWER + column).to(tl.float32)
            signs = tl.load(matrix + number * ORDER + part, mask=part < ORDER, other=0.0)
            tile += signs[:, None] * source
        place = row * (ORDER * POWER) + part[:, None] * POWER + column
    # A stage transforms the lowest bit of the column and moves it to the top: in the end, the order is the old one.
    for _ in tl.static_range(STAGES):
        one, other = tl.split(tl.reshape(tile, [TILE, POWER // 2, 2]))
        tile = tl.reshape(tl.permute(tl.join(one + other, one - other), (0, 2, 1)), [TILE, POWER])
    tile = tile * factor
    stored = stored & (column < POWER)
    if scale is None:
        tl.store(values + place, tile.to(values.dtype.element_ty), mask=stored)
    elif ORDER == 1:
        absmax = tl.max(tl.abs(tile), 1)
        store_codes(values + place, tile, absmax[:, None], stored)
        tl.store(scale + row, scale_of(values, absmax), mask=row < rows)
    else:
        largest = tl.max(tl.max(tl.abs(tile), 1), 0)
        store_codes(values + place, tile, largest, stored)
        tl.store(scale + row, scale_of(values, largest))
