"""How many weights are worked on at once: few on a processor, with its caches; many on a GPU, with its launches."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Solved at once on a processor.
_SLAB = 1 << 22
# What a weight takes while it is solved: target, what is left of it, errors, the best so far and another try.
SOLVE_BYTES = 32
# Share of a GPU's memory that a solve may take, beside factor, sums and hidden states.
_SHARE = 1 / 8
# Of a grid search, whose numbers are read again and again: what fits in the cache of one core, and what a GPU holds.
_SEARCHED, _SEARCHED_ON_GPU = 1 << 16, 1 << 26


def slab_weights(gpu_memory: int = 0) -> int:
    """Weights that are solved at once, on a GPU of so many bytes or, with 0, on a processor.

    A column takes the same launches however many rows it has, so a GPU gets as many as an eighth of it holds: a power
    of two, by which GPUs of the same kind give the same bits.
    """
    if not gpu_memory:
        return _SLAB
    return max(_SLAB, 1 << (int(gpu_memory * _SHARE / SOLVE_BYTES).bit_length() - 1))


def searched_weights(on_gpu: bool) -> int:
    """Weights that a grid is searched for at once; no result depends on it."""
    return _SEARCHED_ON_GPU if on_gpu else _SEARCHED


def slab_of(device: str) -> int:
    """Weights that are solved at once on a device of torch."""
    on_gpu = torch.device(device).type == "cuda"
    return slab_weights(torch.cuda.get_device_properties(device).total_memory if on_gpu else 0)


def rows_at_once(weight: Tensor, columns: int) -> int:
    """Rows of so many columns that a grid is searched for at once, where a tensor lies."""
    return max(1, searched_weights(weight.is_cuda) // columns)


def row_slabs(layers: Sequence[tuple[str, int, int]], weights: int) -> Iterator[list[tuple[str, slice]]]:
    """Rows of layers (name, R, C), all of as many columns, in slabs of about so many weights.

    Small layers come together, large ones in pieces: a solve needs several times the memory of its weights in float32.
    """
    most = max(1, weights // layers[0][2])
    slab: list[tuple[str, slice]] = []
    room = most
    for name, rows, _ in layers:
        start = 0
        while start < rows:
            stop = min(rows, start + room)
            slab.append((name, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield slab
                slab, room = [], most
    if slab:
        yield slab
