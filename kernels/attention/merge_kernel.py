"""Triton kernel that merges partial results of attention, see contract.py."""

# ruff: noqa: E741, N803
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    o,
    m,
    l,
    ranges,
    counts,
    sinks,
    out,
    out_m,
    out_l,
    pieces,
    block_rows,
    row_blocks,
    width,
    heads,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STACKED: tl.constexpr,
    COUNTED: tl.constexpr,
    SINKS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Merge of the pieces of a unit, for BLOCK_R of its block_rows rows.

    o (pieces, block_rows, D), m, l (pieces, block_rows). out (B, N, H * G, D), and its m and l (B, N, H * G) if
    PARTIAL. STACKED: there is one unit, which has all pieces. COUNTED: only the first counts[b] queries have pieces;
    others are 0.
    """
    unit = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_block = unit % row_blocks
    head = (unit // row_blocks) % heads
    sequence = unit // row_blocks // heads
    # int64: o may have more than 2**31 elements.
    row_of_sequence = row_block.to(tl.int64) * block_rows + row
    query = row_of_sequence // GROUPS
    query_head = head * GROUPS + row_of_sequence % GROUPS
    inside = (row < block_rows) & (query < width)
    live = inside
    if COUNTED:
        live &= query < tl.load(counts + sequence)
    first = 0
    count = pieces
    if not STACKED:
        # A unit without a live row has no pieces, and what is stored as their number is arbitrary.
        some = tl.max(live.to(tl.int32), 0) > 0
        first = tl.load(ranges + 2 * unit, mask=some, other=0)
        count = tl.load(ranges + 2 * unit + 1, mask=some, other=0)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_SIZE
    m_row = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    l_row = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in tl.range(0, count, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        mask = live[:, None] & (piece < count)
        place = (first + piece).to(tl.int64) * block_rows + row[:, None]
        m_piece = tl.load(m + place, mask=mask, other=-float("inf"))
        l_piece = tl.load(l + place, mask=mask, other=0.0)
        o_piece = tl.load(o + place[:, :, None] * HEAD_SIZE + dims, mask=mask[:, :, None] & in_head, other=0.0)
        new = tl.maximum(m_row, tl.max(m_piece, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        weight = tl.exp(m_piece - finite[:, None])
        kept = tl.exp(m_row - finite)
        l_row = l_row * kept + tl.sum(l_piece * weight, 1)
        acc = acc * kept[:, None] + tl.sum(o_piece * weight[:, :, None], 1)
        m_row = new
    result = (sequence.to(tl.int64) * width + query) * (heads * GROUPS) + query_head
    if PARTIAL:
        tl.store(out_m + result, m_row, mask=inside)
        tl.store(out_l + result, l_row, mask=inside)
    else:
        if SINKS:
            sink = tl.load(sinks + query_head, mask=inside, other=0.0).to(tl.float32)
            new = tl.maximum(m_row, sink)
            kept = tl.exp(m_row - new)
            l_row = l_row * kept + tl.exp(sink - new)
            acc = acc * kept[:, None]
        # A query that sees no key has l = 0 and o = 0.
        acc = acc / tl.where(l_row == 0.0, 1.0, l_row)[:, None]
    tl.store(out + result[:, None] * HEAD_SIZE + dims, acc.to(out.dtype.element_ty), mask=inside[:, None] & in_head)
