"""Launches the Triton kernels of attention. Imported only on first use, because importing triton takes seconds."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hasten.kernels.attention.contract import Cache, Partial, Scoring, Tree
from hasten.kernels.attention.merge_kernel import merge_kernel
from hasten.kernels.attention.triton_kernel import attention_kernel

# Without a GPU, kernels are interpreted, one program after another.
_INTERPRETED_PROGRAMS = 5
_MERGED_ELEMENTS = 4096  # of partial results that a program of the merge holds at once
_MIN_ROWS = 16  # of a matrix instruction


class Config(NamedTuple):
    """rows: block of rows of a unit. keys: of a tile. programs: number of them on a multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


# Many rows are bound by arithmetic: the largest blocks whose registers do not spill, for 16-bit heads of 128 elements.
# Keys and values are then read few times, and all but once from the L2 cache. The second of each is for windows and
# soft caps, which need more registers. Found by compiling; not measured.
_MANY_ROWS = {
    "sm_90": (Config(128, 64, 8, 2, 1), Config(128, 32, 8, 2, 1)),
    "cuda": (Config(128, 32, 8, 2, 1), Config(128, 32, 8, 2, 1)),
    "hip": (Config(64, 32, 4, 2, 1), Config(64, 32, 4, 1, 1)),
}
# Few rows are bound by memory: many bytes in flight.
_FEW_ROWS = Config(2 * _MIN_ROWS, 64, 4, 2, 2)
_ROW_BYTES = 256  # of a key, for which the tables are made


def config(rows: int, size: int, dtype: torch.dtype, gpu: str, plain: bool = True) -> Config:
    """Configuration for a number of rows (queries times query heads of a KV head) of a sequence.

    gpu: a name of the table. plain: whether there is neither a window nor a soft cap.
    """
    chosen = _FEW_ROWS if rows <= _FEW_ROWS.rows else _MANY_ROWS[gpu][0 if plain else 1]
    shrink = max(1, triton.next_power_of_2(size) * dtype.itemsize // _ROW_BYTES)
    block = max(_MIN_ROWS, min(chosen.rows // shrink, triton.next_power_of_2(rows)))
    keys = max(16, chosen.keys // shrink)
    if block <= 64 and chosen.rows > 64 and shrink == 1:  # half of the warps, twice as many programs
        return Config(block, min(keys, 32), 4, chosen.stages, 2)
    return chosen._replace(rows=block, keys=keys)


def _gpu(device: torch.device) -> str:
    if torch.version.hip:
        return "hip"
    return "sm_90" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else "cuda"


def attention(
    queries: Tensor,
    cache: Cache,
    lengths: Tensor,
    scoring: Scoring,
    positions: Tensor | None,
    tree: Tree | None,
    *,
    sinks: Tensor | None = None,
    out: Partial | None = None,
    chosen: Config | None = None,
) -> Tensor:
    """Attention (B, N, H * G, D) in the dtype of queries; with `out`, o of the partial result, which is written to it.

    chosen: for measurements; None chooses by the sizes.
    """
    batch, width, query_heads, size = queries.shape
    heads = cache.keys.shape[1]
    groups = query_heads // heads
    device = queries.device
    plain = scoring.window is None and scoring.soft_cap is None
    block = chosen or config(width * groups, size, queries.dtype, _gpu(device), plain)
    table = torch.arange(batch, dtype=torch.int32, device=device)[:, None] if cache.table is None else cache.table
    lengths = lengths.contiguous()
    nodes = lengths if tree is None else tree.nodes.contiguous()
    counts = None if tree is None else (nodes if tree.counts is None else tree.counts.contiguous())
    windowed = scoring.window is not None
    if windowed and tree is not None:
        # A depth is read also for keys of the prefix.
        positions = tree.depths if tree.depths is not None and tree.depths.shape[1] else lengths[:, None]
    elif windowed and positions is None:
        positions = (lengths - 1)[:, None].expand(-1, width)
    row_blocks = triton.cdiv(width * groups, block.rows)
    units = batch * heads * row_blocks
    programs = block.programs * _multiprocessors(device) if queries.is_cuda else _INTERPRETED_PROGRAMS
    pieces = units + programs
    partials = Partial(
        torch.empty(pieces, block.rows, size, dtype=torch.float32, device=device),
        *(torch.empty(pieces, block.rows, dtype=torch.float32, device=device) for _ in range(2)),
    )
    ranges = torch.empty(units, 2, dtype=torch.int32, device=device)
    # Arguments that a kernel does not read are given another tensor.
    words = lengths if tree is None else tree.words.contiguous()
    places = lengths if positions is None or not windowed else _adjacent(positions)
    table = _adjacent(table)
    attention_kernel[(programs,)](
        queries,
        cache.keys,
        cache.values,
        table,
        lengths,
        nodes,
        lengths if counts is None else counts,
        words,
        places,
        *partials,
        ranges,
        size**-0.5 if scoring.scale is None else scoring.scale,
        float(scoring.soft_cap or 0),
        scoring.window or 0,
        batch,
        width,
        cache.page_size,
        table.stride(0),
        0 if tree is None else words.shape[2],
        places.stride(0),
        *queries.stride()[:3],
        *cache.keys.stride()[:3],
        HEADS=heads,
        GROUPS=groups,
        HEAD_SIZE=size,
        BLOCK_B=triton.next_power_of_2(batch),
        BLOCK_M=block.rows,
        BLOCK_N=block.keys,
        BLOCK_D=max(_MIN_ROWS, triton.next_power_of_2(size)),
        PAGED=cache.paged,
        TREE=tree is not None,
        WINDOWED=windowed,
        CAPPED=scoring.soft_cap is not None,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    result = torch.empty(queries.shape, dtype=queries.dtype, device=device) if out is None else out.o
    _merge(partials, ranges, counts, sinks, result, out, width, heads, groups, row_blocks, programs)
    return result


def shared_prefix_attention(
    queries: Tensor,
    together: Tensor,
    prefix: Cache,
    prefix_lengths: Tensor,
    suffix: Cache,
    lengths: Tensor,
    scoring: Scoring,
    positions: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """See hasten.kernels.attention.shared_prefix_attention. together (A, B / A * N, H * G, D): queries by prefix.

    positions: those of `together`, from the first key of its prefix; None without a window.
    """
    both = empty_partials(2, queries)
    first = Partial(both.o[0].view(together.shape), *(part[0].view(together.shape[:3]) for part in both[1:]))
    attention(together, prefix, prefix_lengths, scoring, positions, None, out=first)
    attention(queries, suffix, lengths, scoring, None, None, out=both.segment(1))
    return merge(both, sinks, queries.dtype)


def _adjacent(rows: Tensor) -> Tensor:
    """The same with adjacent elements in each row; a copy only if they are not."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def empty_partials(segments: int, queries: Tensor) -> Partial:
    """Unwritten partial results for queries."""
    shape = segments, *queries.shape
    return Partial(
        torch.empty(shape, dtype=torch.float32, device=queries.device),
        *(torch.empty(shape[:-1], dtype=torch.float32, device=queries.device) for _ in range(2)),
    )


def merge(partials: Partial, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Attention output (..., heads, D) of partial results with the segments in the leading dimension."""
    heads, size = partials.o.shape[-2:]
    o, m, total = (part.contiguous() for part in partials)
    result = torch.empty(o.shape[1:], dtype=dtype, device=o.device)
    flat = Partial(o.view(len(o), -1, size), m.view(len(o), -1), total.view(len(o), -1))
    # One unit that has all rows.
    _merge(flat, None, None, sinks, result, None, flat.m.shape[1] // heads, 1, heads, 1, 0)
    return result


def _merge(
    partials: Partial,
    ranges: Tensor | None,
    counts: Tensor | None,
    sinks: Tensor | None,
    result: Tensor,
    out: Partial | None,
    width: int,
    heads: int,
    groups: int,
    row_blocks: int,
    programs: int,
) -> None:
    """ranges: (units, 2), first piece of each unit and number of them; None for one unit that has all pieces."""
    pieces, block_rows, size = partials.o.shape
    block_d = triton.next_power_of_2(size)
    # A unit rarely has more pieces than its equal share of the programs, and one more.
    units = 1 if ranges is None else len(ranges)
    usual = pieces if ranges is None else programs // units + 2
    block_p = min(16, triton.next_power_of_2(usual))
    rows = max(1, _MERGED_ELEMENTS // (block_p * block_d))
    if not result.is_cuda:
        rows = 16  # fewer programs, which are slow when interpreted
    rows = min(rows, triton.next_power_of_2(min(block_rows, width * groups)))
    merge_kernel[(units, triton.cdiv(min(block_rows, width * groups), rows))](
        *partials,
        partials.m if ranges is None else ranges,
        partials.m if counts is None else counts,
        partials.m if sinks is None else sinks.contiguous(),
        result,
        result if out is None else out.m,
        result if out is None else out.l,
        pieces,
        block_rows,
        row_blocks,
        width,
        heads,
        GROUPS=groups,
        HEAD_SIZE=size,
        BLOCK_R=rows,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        STACKED=ranges is None,
        COUNTED=counts is not None,
        SINKS=sinks is not None,
        PARTIAL=out is not None,
    )


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
