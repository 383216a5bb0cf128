"""Quantization and packing as Triton kernels. Imported only on first use, because importing triton takes seconds.

32 codes of b bits fill b words, whatever b is. So a tile has 32 columns, and each of its b words is the sum of the
codes shifted into place; a code that crosses into the next word adds to both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.quantize_pack.reference import GRID, LARGEST, LEAST, Packed
from hasten.kernels.triton_rows import round_to_even

_ROWS, _UNPACKED = 16, 1024
_CODES = tl.constexpr(32)  # codes of a tile's row


def quantize_pack(x: Tensor, bits: int, axis: str, group_size: int, symmetric: bool) -> Packed:
    """See hasten.kernels.quantize_pack.quantize_pack."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    words = torch.empty(rows, triton.cdiv(columns * bits, 32), dtype=torch.int32, device=x.device)
    by_channel = axis == "channel"
    shape = (rows // group_size, columns) if by_channel else (rows, columns // group_size)
    scale = torch.empty(shape, dtype=GRID, device=x.device)
    offset = None if symmetric else torch.empty(shape, dtype=GRID, device=x.device)
    block = min(_ROWS, triton.next_power_of_2(max(1, group_size if by_channel else rows)))
    grid = (shape[0], triton.cdiv(columns, 32)) if by_channel else (triton.cdiv(rows, block), shape[1])
    quantizing_kernel[grid](
        x,
        words,
        scale,
        offset,
        rows,
        columns,
        group_size,
        x.stride(0),
        words.shape[1],
        shape[1],
        LEAST,
        LARGEST,
        bits,
        by_channel,
        block,
    )
    return Packed(words, scale, offset, columns, bits, axis, x.dtype)


def unpack_dequantize(packed: Packed) -> Tensor:
    """See hasten.kernels.quantize_pack.unpack_dequantize."""
    words, scale = packed.words.contiguous(), packed.scale.contiguous()
    rows, columns = words.shape[0], packed.columns
    out = torch.empty(rows, columns, dtype=packed.dtype, device=words.device)
    width = min(_UNPACKED, triton.next_power_of_2(columns))
    height = min(_UNPACKED // width, triton.next_power_of_2(max(1, rows)))
    unpacking_kernel[(triton.cdiv(rows, height), triton.cdiv(columns, width))](
        words,
        scale,
        None if packed.offset is None else packed.offset.contiguous(),
        out,
        rows,
        columns,
        packed.group_size,
        words.shape[1],
        scale.shape[1],
        packed.bits,
        packed.axis == "channel",
        height,
        width,
    )
    return out


@triton.jit
def quantizing_kernel(  # type: ignore[no-untyped-def]
    x,
    words,
    scale,
    offset,
    rows,
    columns,
    group_size,
    x_stride,
    words_stride,
    scale_stride,
    least,
    largest,
    BITS: tl.constexpr,  # noqa: N803
    BY_CHANNEL: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    """One program handles the groups of ROWS rows, or of 32 columns, in tiles of ROWS x 32. offset may be None."""
    top: tl.constexpr = 2**BITS - 1
    lane = tl.arange(0, _CODES)
    if BY_CHANNEL:
        first_row = tl.program_id(0) * group_size
        last_row = first_row + group_size
        first_column = tl.program_id(1) * _CODES
        last_column = columns
        steps = tl.cdiv(group_size, ROWS)
    else:
        first_row = tl.program_id(0) * ROWS
        last_row = rows
        first_column = tl.program_id(1) * group_size
        last_column = first_column + group_size
        steps = tl.cdiv(group_size, _CODES)
    low = tl.full([ROWS, _CODES], float("inf"), tl.float32)
    high = tl.full([ROWS, _CODES], float("-inf"), tl.float32)
    for step in range(0, steps):
        row = first_row + tl.arange(0, ROWS) + (step * ROWS if BY_CHANNEL else 0)
        column = first_column + lane + (0 if BY_CHANNEL else step * _CODES)
        inside = (row < last_row)[:, None] & (column < last_column)[None, :]
        source = x + row[:, None].to(tl.int64) * x_stride + column[None, :]
        low = tl.minimum(low, tl.load(source, mask=inside, other=float("inf")).to(tl.float32))
        high = tl.maximum(high, tl.load(source, mask=inside, other=float("-inf")).to(tl.float32))
    low = tl.min(low, 0 if BY_CHANNEL else 1, keep_dims=True)
    high = tl.max(high, 0 if BY_CHANNEL else 1, keep_dims=True)
    # Codes are those of the rounded scale and of the rounded offset.
    begin = tl.minimum(tl.maximum(low, -largest), largest).to(scale.dtype.element_ty)
    start = begin.to(tl.float32)
    span = 2.0 * tl.maximum(high, -low) if offset is None else high - start
    rounded = tl.minimum(tl.maximum(span / top, least), largest).to(scale.dtype.element_ty)
    width = rounded.to(tl.float32)
    if offset is None:
        start = width * (-(2.0 ** (BITS - 1)))
    if BY_CHANNEL:
        group = (first_column + lane)[None, :]
        stored = group < columns
        group = group + tl.program_id(0).to(tl.int64) * scale_stride
    else:
        group = (first_row + tl.arange(0, ROWS))[:, None]
        stored = group < rows
        group = group.to(tl.int64) * scale_stride + tl.program_id(1)
    tl.store(scale + group, rounded, mask=stored)
    if offset is not None:
        tl.store(offset + group, begin, mask=stored)
    # Codes of a tile: where each begins, as a word and a number of bits within it.
    word = lane * BITS // 32
    shift = (lane * BITS) % 32
    for step in range(0, steps):
        row = first_row + tl.arange(0, ROWS) + (step * ROWS if BY_CHANNEL else 0)
        column = first_column + lane + (0 if BY_CHANNEL else step * _CODES)
        inside = (row < last_row)[:, None] & (column < last_column)[None, :]
        value = tl.load(x + row[:, None].to(tl.int64) * x_stride + column[None, :], mask=inside, other=0.0)
        code = round_to_even((value.to(tl.float32) - start) / width)
        code = tl.minimum(tl.maximum(code, 0.0), top).to(tl.int32)
        code = tl.where(inside, code, 0)
        first_word = (first_column + (0 if BY_CHANNEL else step * _CODES)) // 32 * BITS
        for number in tl.static_range(BITS):
            here = tl.where((word == number)[None, :], code << shift[None, :], 0)
            if 32 % BITS:
                crosses = (word + 1 == number) & (shift + BITS > 32)
                here += tl.where(crosses[None, :], code >> ((32 - shift) % 32)[None, :], 0)
            place = row * 0 + first_word + number
            kept = (row < last_row) & (place < words_stride)
            tl.store(words + row.to(tl.int64) * words_stride + place, tl.sum(here, 1), mask=kept)


@triton.jit
def unpacking_kernel(  # type: ignore[no-untyped-def]
    words,
    scale,
    offset,
    out,
    rows,
    columns,
    group_size,
    words_stride,
    scale_stride,
    BITS: tl.constexpr,  # noqa: N803
    BY_CHANNEL: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """One program handles COLUMNS columns of ROWS rows. offset may be None."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    bit = column * BITS
    word = bit // 32
    shift = bit % 32
    source = words + row * words_stride + word
    code = tl.load(source, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if 32 % BITS:
        crosses = shift + BITS > 32
        rest = tl.load(source + 1, mask=inside & crosses, other=0).to(tl.uint32, bitcast=True)
        code = code | tl.where(crosses, rest << ((32 - shift) % 32).to(tl.uint32), 0)
    code = (code & (2**BITS - 1)).to(tl.float32)
    group = row // group_size * scale_stride + column if BY_CHANNEL else row * scale_stride + column // group_size
    width = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    if offset is None:
        value = (code - 2.0 ** (BITS - 1)) * width
    else:
        value = code * width + tl.load(offset + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)
