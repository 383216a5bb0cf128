"""Number of weights that are solved at once: few on a CPU, for its caches; many on a GPU, to save launches."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Weights that are solved at once on a CPU.
_SLAB = 1 << 22
# Memory of a weight while it is solved: target, residual, error, the best solution so far and the current one.
SOLVE_BYTES = 32
# Share of a GPU's memory for a solve; the rest is for factor, sums and hidden states.
_SHARE = 1 / 8
# Weights in a slab of a grid search, which reads them many times: as many as fit in a core's cache, or on a GPU. Where
# a kernel is one pass over the weights for each range, more of them outweigh the operations on their scales.
_SEARCHED, _SEARCHED_BY_KERNEL, _SEARCHED_ON_GPU = 1 << 17, 1 << 20, 1 << 26


def slab_weights(gpu_memory: int = 0) -> int:
    """Weights that are solved at once. gpu_memory: bytes of the GPU, 0 for a CPU.

    The launches for a column do not depend on its rows, so a slab takes an eighth of the GPU's memory. It is rounded
    down to a power of two, so that GPUs of the same kind give the same bits.
    """
    if not gpu_memory:
        return _SLAB
    return max(_SLAB, 1 << (int(gpu_memory * _SHARE / SOLVE_BYTES).bit_length() - 1))


def searched_weights(on_gpu: bool, by_kernel: bool = False) -> int:
    """Weights in a slab of a grid search; no result depends on it."""
    if on_gpu:
        return _SEARCHED_ON_GPU
    return _SEARCHED_BY_KERNEL if by_kernel else _SEARCHED


def slab_of(device: str) -> int:
    """Weights that are solved at once on a torch device."""
    on_gpu = torch.device(device).type == "cuda"
    return slab_weights(torch.cuda.get_device_properties(device).total_memory if on_gpu else 0)


def rows_at_once(weight: Tensor, columns: int, by_kernel: bool = False) -> int:
    """Rows in a slab of a grid search, for a weight with this many columns, on the weight's device.

    by_kernel: whether the search is by kernels/grid_rounding.
    """
    return max(1, searched_weights(weight.is_cuda, by_kernel) // columns)


def row_slabs(layers: Sequence[tuple[str, int, int]], weights: int) -> Iterator[list[tuple[str, slice]]]:
    """Rows of layers (name, R, C), which have the same number of columns, in slabs of about `weights` weights.

    Small layers are joined and large ones cut: a solve needs several times the memory of its weights in float32.
    """
    max_rows = max(1, weights // layers[0][2])
    slab: list[tuple[str, slice]] = []
    room = max_rows
    for name, rows, _ in layers:
        start = 0
        while start < rows:
            stop = min(rows, start + room)
            slab.append((name, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield slab
                slab, room = [], max_rows
    if slab:
        yield slab
