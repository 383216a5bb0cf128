"""Statistics of groups as a Triton kernel. Imported only on first use, because importing triton takes seconds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.group_statistics.reference import GroupStatistics

_TILE, _COLUMNS = 2048, 1024


def group_statistics(x: Tensor, group_size: int) -> GroupStatistics:
    """See hasten.kernels.group_statistics.group_statistics."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, groups = x.shape[0], x.shape[1] // group_size
    out = torch.empty(5, rows, groups, dtype=torch.float32, device=x.device)
    width = min(_COLUMNS, triton.next_power_of_2(group_size))
    block = max(1, min(_TILE // width, triton.next_power_of_2(rows * groups)))
    kernel[(triton.cdiv(rows * groups, block),)](x, out, rows * groups, groups, group_size, x.stride(0), block, width)
    return GroupStatistics(*out)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    count,
    groups,
    group_size,
    stride,
    GROUPS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """One program handles GROUPS groups of all rows' `count`, COLUMNS columns at a time."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    begin = group // groups * stride + group % groups * group_size
    low = tl.full([GROUPS, COLUMNS], float("inf"), tl.float32)
    high = tl.full([GROUPS, COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS, COLUMNS], tl.float32)
    squares = tl.zeros([GROUPS, COLUMNS], tl.float32)
    for start in range(0, group_size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (group < count)[:, None] & (column < group_size)[None, :]
        value = tl.load(x + begin[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        total += value
        squares += value * value
    minimum, maximum = tl.min(low, 1), tl.max(high, 1)
    stored = group < count
    out += group
    tl.store(out, minimum, mask=stored)
    # int64: five times the number of groups may exceed 2**31. A count of 1 is a constant, which has no method `to`.
    step = tl.full((), 0, tl.int64) + count
    tl.store(out + step, maximum, mask=stored)
    tl.store(out + 2 * step, tl.maximum(-minimum, maximum), mask=stored)
    tl.store(out + 3 * step, tl.sum(total, 1), mask=stored)
    tl.store(out + 4 * step, tl.sum(squares, 1), mask=stored)
