"""Sum of x xᵀ as a Triton kernel. It is imported only on first use, because importing triton takes seconds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Below this number of columns, the larger tiles are too few for all multiprocessors.
_MANY_COLUMNS = 2048
_TOKENS = 32


def add(sums: Tensor, x: Tensor, width: int, tile: tuple[int, int] | None = None) -> None:
    """See hasten.kernels.second_moment.add. tile: its rows and columns; None: a choice by dtype and columns."""
    if not x.is_cuda and x.dtype == torch.bfloat16:
        x = x.float()  # Triton's interpreter multiplies bfloat16 wrongly
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, columns = x.shape
    if tile is None:
        # 128 x 128 sums and what is added to them do not fit the registers. float32 runs on no tensor cores.
        tile = (128, 64) if columns >= _MANY_COLUMNS and x.dtype != torch.float32 else (64, 64)
    grid = triton.cdiv(columns, tile[1]), triton.cdiv(columns, tile[0])
    warps = 8 if tile[0] == 128 else 4
    kernel[grid](x, sums, tokens, columns, width, x.stride(0), *tile, _TOKENS, num_warps=warps, num_stages=3)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x,
    sums,
    tokens,
    columns,
    width,
    x_stride,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
):
    """One program adds one tile. Tiles that the panels do not have, those far above the diagonal, end at once.

    No two programs share a sum, and each adds tokens in their order: sums repeat to the bit.
    """
    first_row, first_column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    # The last row of the tile is the one with the most columns.
    if first_column >= ((first_row + ROWS - 1) // width + 1) * width:
        return
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        source = x + token[:, None].to(tl.int64) * x_stride
        inside = (token < tokens)[:, None]
        left = tl.load(source + row[None, :], mask=inside & (row < columns)[None, :], other=0.0)
        right = tl.load(source + column[None, :], mask=inside & (column < columns)[None, :], other=0.0)
        # ieee: tf32 would drop 13 bits of float32 inputs.
        products = tl.dot(tl.trans(left), right, products, input_precision="ieee")
    panel = row // width
    stop = tl.minimum(columns, (panel + 1) * width)
    stored = (row < columns)[:, None] & (column[None, :] < stop[:, None])
    # int64 once a tile, because the panels before may have more than 2**31 sums; int32 within it, because 64-bit
    # offsets of all its sums do not fit the registers.
    before = first_row // width
    begin = before.to(tl.int64) * (before + 1) // 2 * width * width
    later = (panel * (panel + 1) // 2 - before * (before + 1) // 2) * width * width
    target = sums + begin + ((later + (row - panel * width) * stop)[:, None] + column[None, :])
    tl.store(target, tl.load(target, mask=stored, other=0.0) + products, mask=stored)
