"""Triton kernel of attention: partial results by stream-K division of work, which another kernel merges.

Source of the division: Sanovar et al. 2024, arXiv:2405.10480 (Lean Attention).
Departs from it: partial results are merged by a second kernel in a fixed order, and not by the program that finishes
last, so that no program waits and results repeat. Each program computes the division itself from the lengths, so that
they need not be known on the host. The keys of a tree are the last tiles of its prefix.

A unit is a block of rows of a (sequence, KV head); a row is a query head of a query, so that all queries of a sequence
and all query heads of a KV head share one read of keys and values. Its work is a number of tiles of BLOCK_N keys. All
tiles of all units lie in one sequence, of which each program processes an equal range. What a program computes of a
unit is a piece. Going from a piece to the next, the unit, the program or both increase, so that unit + program is a
place for its partial result that no other piece has, and the pieces of a unit are adjacent.
"""

# ruff: noqa: E741, N803
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attention_kernel(
    queries,
    keys,
    values,
    table,
    lengths,
    nodes,
    counts,
    masks,
    positions,
    o,
    m,
    l,
    ranges,
    scale,
    soft_cap,
    window,
    batch,
    width,
    page_size,
    table_stride,
    words,
    position_stride,
    query_stride_b,
    query_stride_n,
    query_stride_h,
    page_stride,
    head_stride,
    token_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr,
    TREE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Partial results of pieces; see the module.

    o (pieces, BLOCK_M, D), m, l (pieces, BLOCK_M) float32. ranges: (units, 2) int32, the first piece of each unit and
    their number. positions: depths of nodes (B, nodes) if TREE, else positions of queries (B, N). Keys and values have
    the same strides.
    """
    program = tl.program_id(0)
    sequences = tl.arange(0, BLOCK_B)
    real = sequences < batch
    all_lengths = tl.load(lengths + sequences, mask=real, other=0)
    all_keys = all_lengths
    all_rows = tl.where(real, width * GROUPS, 0)
    if TREE:
        all_keys += tl.load(nodes + sequences, mask=real, other=0)
        all_rows = tl.load(counts + sequences, mask=real, other=0) * GROUPS
    # With a window, tiles that no query sees are left out: positions of queries are lengths - 1 at least.
    all_tiles = tl.cdiv(all_keys, BLOCK_N)
    if WINDOWED:
        all_tiles -= tl.maximum(all_lengths - window, 0) // BLOCK_N
    # A unit without keys has one tile, all masked: its partial result must be written, too.
    all_tiles = tl.maximum(all_tiles, 1)
    work = all_tiles * tl.cdiv(all_rows, BLOCK_M) * HEADS
    ends = tl.cumsum(work, 0)
    share = tl.cdiv(tl.sum(work, 0), tl.num_programs(0))
    tile = program * share
    stop = tl.minimum(tile + share, tl.sum(work, 0))

    row_range = tl.arange(0, BLOCK_M)
    key_range = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    while tile < stop:
        sequence = tl.sum((ends <= tile).to(tl.int32), 0)
        here = sequences == sequence
        length = tl.sum(tl.where(here, all_lengths, 0), 0)
        total = tl.sum(tl.where(here, all_keys, 0), 0)
        rows_of_sequence = tl.sum(tl.where(here, all_rows, 0), 0)
        tiles = tl.sum(tl.where(here, all_tiles, 0), 0)
        blocks = tl.cdiv(rows_of_sequence, BLOCK_M)
        local = tile - tl.sum(tl.where(here, ends - work, 0), 0)
        block_of_sequence = local // tiles
        head = block_of_sequence // blocks
        row_block = block_of_sequence % blocks
        begin = local % tiles
        taken = tl.minimum(tiles - begin, stop - tile)
        unit = (sequence * HEADS + head) * tl.cdiv(width * GROUPS, BLOCK_M) + row_block
        if begin == 0:
            tl.store(ranges + 2 * unit, unit + program)
            tl.store(ranges + 2 * unit + 1, (tile + tiles - 1) // share - program + 1)

        rows = row_block * BLOCK_M + row_range
        live = rows < rows_of_sequence
        query = rows // GROUPS
        query_head = head * GROUPS + rows % GROUPS
        offsets = sequence.to(tl.int64) * query_stride_b + query * query_stride_n + query_head * query_stride_h
        in_head = dims < HEAD_SIZE
        q = tl.load(queries + offsets[:, None] + dims, mask=live[:, None] & in_head, other=0.0)

        skipped = 0
        query_position = query
        if WINDOWED:
            skipped = tl.maximum(length - window, 0) // BLOCK_N
            if TREE:
                own = (total - length) - rows_of_sequence // GROUPS + query
                query_position = length + tl.load(
                    positions + sequence * position_stride + own, mask=live & (own >= 0), other=0
                )
            else:
                query_position = tl.load(positions + sequence * position_stride + query, mask=live, other=0)

        m_row = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        l_row = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        low = skipped + begin
        high = low + taken
        # Tiles that every query sees as a whole need no mask.
        dense = low
        if not WINDOWED:
            dense = tl.maximum(low, tl.minimum(high, length // BLOCK_N))
        for number in tl.range(low, dense):
            key = number * BLOCK_N + key_range
            k, v = _load_tile(
                keys, values, table, sequence, head, number, key, total, page_size, table_stride, page_stride,
                head_stride, token_stride, BLOCK_N, HEAD_SIZE, BLOCK_D, PAGED, False,
            )  # fmt: skip
            s = _scores(q, k, scale, soft_cap, CAPPED)
            new = tl.maximum(m_row, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            kept = tl.exp2(m_row - new)
            l_row = l_row * kept + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
            m_row = new
        for number in tl.range(dense, high):
            key = number * BLOCK_N + key_range
            k, v = _load_tile(
                keys, values, table, sequence, head, number, key, total, page_size, table_stride, page_stride,
                head_stride, token_stride, BLOCK_N, HEAD_SIZE, BLOCK_D, PAGED, True,
            )  # fmt: skip
            s = _scores(q, k, scale, soft_cap, CAPPED)
            if TREE:
                # One number for a row and not a truth value for an element, of which there would be many at a time.
                start = number * BLOCK_N
                bits = _tile_bits(masks, (sequence * width + query) * words, words, start - length, live)
                bits = (bits & _ones(total - start)) | _ones(length - start)
                s = tl.where(((bits[:, None] >> key_range) & 1) != 0, s, -float("inf"))
            else:
                s = tl.where(key < length, s, -float("inf"))
            if WINDOWED:
                key_position = key
                if TREE:
                    # Bits have removed what is behind the nodes.
                    node = tl.minimum(key, total - 1) - length
                    depth = tl.load(positions + sequence * position_stride + tl.maximum(node, 0))
                    key_position = length + tl.where(node < 0, node, depth)
                s = tl.where((query_position[:, None] - key_position) < window, s, -float("inf"))
            new = tl.maximum(m_row, tl.max(s, 1))
            # A row that has seen no key yet: -inf minus -inf is nan.
            finite = tl.where(new == -float("inf"), 0.0, new)
            p = tl.exp2(s - finite[:, None])
            kept = tl.exp2(m_row - finite)
            l_row = l_row * kept + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
            m_row = new

        place = (unit + program).to(tl.int64) * BLOCK_M + row_range
        tl.store(o + place[:, None] * HEAD_SIZE + dims, acc, mask=live[:, None] & in_head)
        tl.store(m + place, m_row * LN_2, mask=live)
        tl.store(l + place, l_row, mask=live)
        tile += taken


@triton.jit
def _load_tile(
    keys, values, table, sequence, head, number, key, total, page_size, table_stride, page_stride, head_stride,
    token_stride,
    BLOCK_N: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values (BLOCK_N, BLOCK_D) of a tile; 0 beyond the sequence if MASKED."""
    dims = tl.arange(0, BLOCK_D)
    inside = key < total
    if PAGED:
        # A page is addressed for every key, so that its size need not be a multiple of BLOCK_N.
        entries = table + sequence * table_stride + key // page_size
        page = tl.load(entries, mask=inside, other=0) if MASKED else tl.load(entries)
        offsets = page.to(tl.int64) * page_stride + (key % page_size) * token_stride
    else:
        page = tl.load(table + sequence * table_stride).to(tl.int64)
        # 64 bits for the start of the tile, 32 bits within it.
        start = page * page_stride + tl.full((), BLOCK_N, tl.int64) * number * token_stride
        offsets = start + tl.arange(0, BLOCK_N) * token_stride
    offsets = offsets[:, None] + head.to(tl.int64) * head_stride + dims
    key_places, value_places = keys + offsets, values + offsets
    in_head = dims < HEAD_SIZE
    if MASKED:
        mask = inside[:, None] & in_head
        return tl.load(key_places, mask=mask, other=0.0), tl.load(value_places, mask=mask, other=0.0)
    if HEAD_SIZE == BLOCK_D:
        return tl.load(key_places), tl.load(value_places)
    return tl.load(key_places, mask=in_head, other=0.0), tl.load(value_places, mask=in_head, other=0.0)


@triton.jit
def _tile_bits(masks, row, words, node, live):
    """Bits (BLOCK_M,) int64 of the 64 nodes from `node` on, which may be negative; row: offset of a row's words.

    A word is loaded for a row and not for every element of the tile, whose addresses would fill the registers.
    """
    first = node >> 5
    shift = (node & 31).to(tl.int64)
    low = _word(masks, row, first, words, live)
    middle = _word(masks, row, first + 1, words, live)
    high = _word(masks, row, first + 2, words, live)
    # Two shifts, because one of 64 is undefined.
    return (low >> shift) | (middle << (32 - shift)) | ((high << 1) << (63 - shift))


@triton.jit
def _ones(count):
    """The lowest `count` bits of an int64; all for 64 or more, none for less than one."""
    bounded = tl.minimum(tl.maximum(count, 0), 64)
    # Two shifts, because one of 64 is undefined.
    half = bounded // 2
    return ((tl.full((), 1, tl.int64) << half) << (bounded - half)) - 1


@triton.jit
def _word(masks, row, word, words, live):
    """A word of each row as int64 without a sign; 0 where there is none."""
    place = row + word
    return tl.load(masks + place, mask=live & (place >= row) & (place < row + words), other=0).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def _scores(q, k, scale, soft_cap, CAPPED: tl.constexpr):
    """Scores times log2(e), because exp2 is an instruction and exp is not."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAPPED:
        # tanh(x) = 2 sigmoid(2 x) - 1. Triton has no tanh for all devices.
        return (2.0 * tl.sigmoid(s * (2.0 * scale / soft_cap)) - 1.0) * (soft_cap * LOG2_E)
    return s * (scale * LOG2_E)
