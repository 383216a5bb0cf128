"""Product of many rows of activations and a packed weight on tensor cores, and the sum over splits of the columns.

The weight is the first operand, so that few rows of activations pad little. Its tile is unpacked along an axis of its
own, words (R, U) to codes (R, U, codes of a unit), which is then merged with the columns: in the order of the columns,
so x is read as it is. A unit is one word, or three words with 3 bits.
"""
# Triton compiles a part of Python, without types.
# ruff: noqa: N803, SIM108
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from hasten.kernels.packed_gemm.triton_gemv import float_bits, scale_value, unit_codes

# 2**23 as a float32: a code OR'ed into its mantissa is added exactly.
_MAGIC = tl.constexpr(0x4B000000)


@triton.jit
def _unpack(word, inside, BITS: tl.constexpr):
    """Codes (R, U, codes of a unit) uint32 of the units that pointers (R, U) point to."""
    low = tl.load(word, mask=inside, other=0).to(tl.uint32, bitcast=True)[:, :, None]
    code = tl.arange(0, unit_codes(BITS))[None, None, :]
    bit = (code * BITS % 32).to(tl.uint32)
    if BITS == 3:
        middle = tl.load(word + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)[:, :, None]
        high = tl.load(word + 2, mask=inside, other=0).to(tl.uint32, bitcast=True)[:, :, None]
        first = code * BITS // 32
        following = tl.where(first == 0, middle, high)
        low = tl.where(first == 0, low, tl.where(first == 1, middle, high))
        # In two steps, because a shift by 32 bits is undefined.
        unpacked = (low >> bit) | ((following << 1) << (31 - bit))
    else:
        unpacked = low >> bit
    return unpacked & (2**BITS - 1)


@triton.jit
def _scales(
    scale,
    zero_point,
    first,
    k,
    stop,
    GROUP: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Scales and zero points (R, U, 1) of the tile at unit k. first: (R, 1), of each row.

    A scale is loaded for each unit, although units share them: loads of single scales would impose their own
    distribution over threads, one row a thread, on the tile of the weight. Symmetric weights have no zero points: the
    scales are returned in their place, and not used.
    """
    unit = k + tl.arange(0, BLOCK_U)[None, :]
    place = (first + unit // GROUP)[:, :, None]
    inside = (unit < stop)[:, :, None]
    step = tl.load(scale + place, mask=inside, other=0.0)
    if SYMMETRIC:
        zero = step
    else:
        zero = tl.load(zero_point + place, mask=inside, other=0)
    return step, zero


@triton.jit
def kernel(
    x,
    codes,
    scale,
    zero_point,
    group_index,
    alpha,
    out,
    n,
    rows,
    columns,
    x_stride,
    units,
    x_units,
    words,
    groups,
    units_of_split,
    GROUP: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    SCALE: tl.constexpr,
    MIDDLE: tl.constexpr,
    FACTOR: tl.constexpr,
    ALPHA: tl.constexpr,
    WRAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    GATHER: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """One program multiplies BLOCK_R rows of the weight by BLOCK_N rows of x, over the columns of one split.

    x: (n, columns), rows x_stride apart. Rows of codes have whole units. out: (splits, n, rows). GROUP is in units, or
    in columns if GATHER, where each code reads its own scale. For the other arguments see triton_gemv.kernel.
    """
    CODES: tl.constexpr = unit_codes(BITS)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # int64: tensors may have more than 2**31 elements.
    weight_row = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    scale_row = weight_row // ROW_GROUP * groups
    x_start = x + tl.minimum(x_row, n - 1).to(tl.int64)[None, :] * x_stride
    accumulator = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    start = tl.program_id(2) * units_of_split
    stop = tl.minimum(start + units_of_split, units)
    if not GATHER:
        step, zero = _scales(scale, zero_point, scale_row, start, stop, GROUP, BLOCK_U, SYMMETRIC)
    for k in range(start, stop, BLOCK_U):
        unit = k + tl.arange(0, BLOCK_U)[None, :]
        inside = unit < stop
        unpacked = _unpack(codes + weight_row * words + unit * (3 if BITS == 3 else 1), inside, BITS)
        if GATHER:
            column = unit[:, :, None] * CODES + tl.arange(0, CODES)[None, None, :]
            inside_scale = column < columns
            if INDEXED:
                group = tl.load(group_index + column, mask=inside_scale, other=0)
            else:
                group = column // GROUP
            place = weight_row[:, :, None] * groups + group
            step = tl.load(scale + place, mask=inside_scale, other=0.0)
            if SYMMETRIC:
                zero = step
            else:
                zero = tl.load(zero_point + place, mask=inside_scale, other=0)
        if FLOAT:
            value = float_bits(unpacked, BITS).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            value = (unpacked | _MAGIC).to(tl.float32, bitcast=True)
            if SYMMETRIC and MIDDLE % 1.0:
                value = (value - 2.0**23) - MIDDLE  # one half, which 2**23 cannot hold
            elif SYMMETRIC:
                value -= 2.0**23 + MIDDLE
            else:
                value -= 2.0**23 + zero.to(tl.float32)
        weight = tl.reshape(
            (value * (scale_value(step, SCALE) * FACTOR)).to(x.dtype.element_ty), (BLOCK_R, BLOCK_U * CODES)
        )
        if not GATHER:
            # Those of the next tile: their latency is hidden by this tile's product.
            step, zero = _scales(scale, zero_point, scale_row, k + BLOCK_U, stop, GROUP, BLOCK_U, SYMMETRIC)
        column = k * CODES + tl.arange(0, BLOCK_U * CODES)[:, None]
        x_column = column % (x_units * CODES) if WRAP else column
        x_tile = tl.load(x_start + x_column, mask=(x_column < columns) & (column < stop * CODES), other=0.0)
        accumulator = tl.dot(weight, x_tile, accumulator, input_precision="ieee")
    if ALPHA:
        accumulator *= tl.load(alpha)
    target = out + (tl.program_id(2) * n + x_row).to(tl.int64)[None, :] * rows + row[:, None]
    inside_out = (row < rows)[:, None] & (x_row < n)[None, :]
    tl.store(target, accumulator.to(out.dtype.element_ty), mask=inside_out)


@triton.jit
def sum_splits(partial, out, count, splits, BLOCK: tl.constexpr):
    """Sum (count,) of partial products (splits, count) float32, in the order of the splits."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partial + place, mask=inside, other=0.0)
        partial += count
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
