"""Product of up to four rows of activations and a packed weight: one pass over the codes, no tensor cores.

The kernel is bound by memory only if a code costs few instructions. Shifted and masked, a code is OR'ed into the top
bits of the mantissa of 1.0, which makes it the float f = 1 + code / F with one instruction; F is a power of two.
Products are accumulated as f * (F * x), and the sum of F * x, which is the same for all rows of the weight, is
subtracted once for each unit. Neighbouring codes share a shift, so that a code of 4 bits costs a multiply-add, a mask
and half a shift. F is at most 256, so the error is that of float32 sums with terms up to 256 times as large, 2**-16 of
a product, below the rounding of 16-bit dtypes. With float32 activations, codes are converted exactly instead.

A unit is one word, or three words with 3 bits. A tile of units is the tensor (RT, KW, 8, 4, V). Triton's default
distribution of such a tensor is: V units (16 bytes) to a thread, 8 times 4 threads to a warp, KW warps along the
columns, and RT rows to each thread, which reuses the registers of x. Sums over columns are made in a fixed order.
"""
# Triton compiles a part of Python: no types, no unpacking, tuples that grow in loops which are unrolled.
# ruff: noqa: N803, E741, SIM108, SIM300, RUF005
# mypy: disable-error-code="assignment, no-untyped-def"

import triton
import triton.language as tl

ROWS_OF_WARP = tl.constexpr(8)
LANES = tl.constexpr(4)
# Lowest position in the mantissa, of 23 bits, of the codes that share a shift: F is at most 2**(23 - 15).
_LOW = tl.constexpr(15)
_ONE = tl.constexpr(0x3F800000)


@triton.constexpr_function
def unit_codes(bits: int) -> int:
    """Codes of a unit."""
    return 32 if bits == 3 else 32 // bits


@triton.constexpr_function
def _place(j: int, bits: int) -> tuple[int, int, int]:
    """Word of the unit that code j begins in, right shift (negative: left), and the code's position after the shift."""
    word = j * bits // 32
    together = (23 - _LOW.value) // bits
    # The codes that lie wholly in a word are numbered from its first one.
    first = -(-32 * word // bits)
    start = (first + (j - first) // together * together) * bits - 32 * word
    return word, start - _LOW.value, _LOW.value + j * bits - 32 * word - start


@triton.constexpr_function
def _factor(j: int, bits: int, exact: bool) -> float:
    """F of code j."""
    if exact:
        return 1.0
    crosses = j * bits % 32 + bits > 32
    return 2.0 ** (bits if crosses else 23 - _place(j, bits)[2])


@triton.constexpr_function
def code_order(j: int, bits: int, float_codes: bool) -> int:
    """Code that is unpacked as number j: of float codes, the two that share an instruction are neighbours."""
    return j // 2 + j % 2 * (16 // bits) if float_codes else j


@triton.jit
def float_bits(bits, BITS: tl.constexpr):
    """Float16 bits of codes e4m3 (8 bits) or e2m1 (4 bits), divided by 2**8 or 2**14, in both halves of uint32."""
    if BITS == 8:
        return ((bits & 0x007F007F) << 7) | ((bits & 0x00800080) << 8)
    else:
        return ((bits & 0x00070007) << 9) | ((bits & 0x00080008) << 12)


@triton.jit
def scale_value(stored, SCALE: tl.constexpr):
    """Scales in float32. SCALE: "float", or "e8m0" or "e4m3" stored as uint8."""
    if SCALE == "e8m0":
        return (stored.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        bits = float_bits(stored.to(tl.uint32), 8).to(tl.uint16)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return stored.to(tl.float32)


@triton.jit
def _field(words, one, J: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, EXACT: tl.constexpr):
    """Code J of each unit as the float 1 + code / F, or as it is if EXACT; as it is divided by a power of two if FLOAT."""
    if FLOAT:
        pair = float_bits(words[0] >> (J * BITS % 16), BITS)
        return (pair >> (J * BITS // 16 * 16)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    PLACE: tl.constexpr = _place(J, BITS)
    BIT: tl.constexpr = J * BITS % 32
    MASK: tl.constexpr = 2**BITS - 1
    word = words[PLACE[0]]
    if BIT + BITS > 32:
        word = (word >> BIT) | (words[PLACE[0] + 1] << (32 - BIT))
        if EXACT:
            return (word & MASK).to(tl.float32)
        return (((word << (23 - BITS)) & (MASK << (23 - BITS))) | one).to(tl.float32, bitcast=True)
    if EXACT:
        return ((word >> BIT) & MASK).to(tl.float32)
    if PLACE[1] < 0:
        word = word << -PLACE[1]
    else:
        word = word >> PLACE[1]
    return ((word & (MASK << PLACE[2])) | one).to(tl.float32, bitcast=True)


@triton.jit
def _element(quads, I: tl.constexpr, DTYPE: tl.constexpr):
    """Element I of 16-bit floats, of which each int64 holds four, as float32."""
    pair = (quads[I // 4] >> (32 * (I % 4 // 2))).to(tl.uint32)
    if DTYPE == tl.bfloat16:
        if I % 2:
            return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        return (pair << 16).to(tl.float32, bitcast=True)
    return ((pair >> (16 * (I % 2))) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    if EVEN:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=inside, other=0)
    return values


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
    NR: tl.constexpr,
    RT: tl.constexpr,
    KW: tl.constexpr,
    V: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    GATHER: tl.constexpr,
    INDEXED: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program multiplies NR rows of x by 8 RT rows of the weight, over the columns of one split.

    x: (n, x_units * codes of a unit), contiguous, as int64 of four elements, or float32. If WRAP, x is repeated along the
    units. out: (splits, n, rows). GROUP is in units, or in columns if GATHER, where each code reads its own scale.
    ROW_GROUP rows share scales. ONE_SCALE: the V units of a thread are in one group. The product is multiplied by FACTOR,
    and by the number at alpha if ALPHA.
    """
    CODES: tl.constexpr = unit_codes(BITS)
    EXACT: tl.constexpr = GATHER or DTYPE == tl.float32 or FLOAT
    lane = tl.arange(0, KW)[None, :, None, None] * LANES + tl.arange(0, LANES)[None, None, None, :]
    first_row = tl.program_id(0) * (RT * ROWS_OF_WARP)
    row_of_warp = first_row + tl.arange(0, ROWS_OF_WARP)[None, None, :, None]
    # The constant plus zero, which the compiler does not know to be zero: it would otherwise load the constant again
    # for each code instead of keeping it in a register.
    one = tl.expand_dims((row_of_warp >> 31) + _ONE, 4).to(tl.uint32)
    # Rows beyond the last one are read again, and not written. int64: a weight may have more than 2**31 bytes.
    row = tl.minimum(row_of_warp + tl.arange(0, RT)[:, None, None, None] * ROWS_OF_WARP, rows - 1).to(tl.int64)
    unit_row = tl.expand_dims(row, 4)
    x_rows = ()
    accumulators = ()
    for i in tl.static_range(NR):
        x_rows = x_rows + (
            x
            + tl.minimum(tl.program_id(1) * NR + i, n - 1).to(tl.int64)
            * (x_units * CODES // (1 if DTYPE == tl.float32 else 4)),
        )
        accumulators = accumulators + (tl.zeros((RT, KW, ROWS_OF_WARP, LANES), tl.float32),)
    start = tl.program_id(2) * units_of_split
    stop = tl.minimum(start + units_of_split, units)
    for k in range(start, stop, KW * LANES * V):
        lane_unit = k + lane * V
        unit = tl.expand_dims(lane_unit, 4) + tl.arange(0, V)[None, None, None, None, :]
        inside = unit < stop
        word = codes + unit_row * words + unit * (3 if BITS == 3 else 1)
        unit_words = (_load(word, inside, EVEN).to(tl.uint32, bitcast=True),)
        if BITS == 3:
            for i in tl.static_range(1, 3):
                # The last unit of a row may have fewer than three words.
                inside_word = (unit * 3 + i < words) & inside
                unit_words = unit_words + (_load(word + i, inside_word, EVEN).to(tl.uint32, bitcast=True),)
        if not GATHER:
            if ONE_SCALE:
                place = row // ROW_GROUP * groups + lane_unit // GROUP
                in_scale = lane_unit < stop
            else:
                place = unit_row // ROW_GROUP * groups + unit // GROUP
                in_scale = inside
            step = scale_value(_load(scale + place, in_scale, EVEN), SCALE)
            zero = MIDDLE if SYMMETRIC else _load(zero_point + place, in_scale, EVEN).to(tl.float32)
        x_unit = unit % x_units if WRAP else unit
        # Four elements of each row of x at a time, by rows.
        quads = ()
        dots = ()
        for i in tl.static_range(NR):
            offset = tl.zeros((1, KW, 1, LANES, V), tl.float32)
            total = tl.zeros((1, KW, 1, LANES, V), tl.float32)
            if DTYPE != tl.float32:
                for q in tl.static_range(CODES // 4):
                    quads = quads + (_load(x_rows[i] + x_unit * (CODES // 4) + q, inside, EVEN),)
            if not EXACT:
                for j in tl.static_range(CODES):
                    value = _element(quads, i * CODES + j, DTYPE)
                    offset += value * (_factor(j, BITS, False) + (MIDDLE if SYMMETRIC else 0.0))
                    total += value
                if not SYMMETRIC:
                    offset = offset + total * (tl.expand_dims(zero, 4) if ONE_SCALE else zero)
            dots = dots + (tl.zeros((RT, KW, ROWS_OF_WARP, LANES, V), tl.float32) - offset,)
        for j in tl.static_range(CODES):
            code = _field(unit_words, one, code_order(j, BITS, FLOAT), BITS, FLOAT, EXACT)
            if GATHER:
                column = unit * CODES + code_order(j, BITS, FLOAT)
                if INDEXED:
                    group = tl.load(group_index + column, mask=column < columns, other=0)
                else:
                    group = tl.minimum(column // GROUP, groups - 1)
                place = unit_row * groups + group
                zero = MIDDLE if SYMMETRIC else tl.load(zero_point + place).to(tl.float32)
                code = (code - zero) * tl.load(scale + place).to(tl.float32)
            elif EXACT:
                code -= tl.expand_dims(zero, 4) if ONE_SCALE and not SYMMETRIC else zero
            new_dots = ()
            for i in tl.static_range(NR):
                if DTYPE == tl.float32:
                    value = _load(x_rows[i] + x_unit * CODES + code_order(j, BITS, FLOAT), inside, EVEN)
                else:
                    value = _element(quads, i * CODES + code_order(j, BITS, FLOAT), DTYPE)
                new_dots = new_dots + (dots[i] + code * (value * _factor(j, BITS, EXACT)),)
            dots = new_dots
        new_accumulators = ()
        for i in tl.static_range(NR):
            if GATHER:
                dot = tl.sum(dots[i], axis=4)
            elif ONE_SCALE:
                dot = tl.sum(dots[i], axis=4) * step
            else:
                dot = tl.sum(dots[i] * step, axis=4)
            new_accumulators = new_accumulators + (accumulators[i] + dot,)
        accumulators = new_accumulators
    out_row = first_row + tl.arange(0, RT)[:, None] * ROWS_OF_WARP + tl.arange(0, ROWS_OF_WARP)[None, :]
    for i in tl.static_range(NR):
        x_row = tl.program_id(1) * NR + i
        product = tl.sum(tl.sum(accumulators[i], axis=3), axis=1) * FACTOR
        if ALPHA:
            product *= tl.load(alpha)
        target = out + (tl.program_id(2) * n + x_row).to(tl.int64) * rows + out_row
        tl.store(target, product.to(out.dtype.element_ty), mask=out_row < tl.where(x_row < n, rows, 0))
