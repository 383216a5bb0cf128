"""Chooses between the kernel and torch's product, by one comparison on each machine.

It holds for all numbers of rows: if it changed with them, a token would get other products alone than in a tree.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from math import log
from pathlib import Path
from time import thread_time

import torch
from torch import Tensor

from hasten.kernels.compiled import library_path
from hasten.kernels.skinny_gemm import c_kernel
from hasten.kernels.skinny_gemm.reference import pack_panels

# Rows of decoding passes: a token, trees, trees of several sequences.
ROWS = (1, 8, 16, 64)
_SIZE = 1024
_REPEATS = 5
# torch is chosen if the kernel takes this many times its time. The distance from 1 keeps two processes from choosing
# differently where both take about the same time; the packed weight has half the bytes.
_MAX_RATIO = 1.1


@cache
def is_faster() -> bool:
    """Whether the kernel, which must be available, is used on this machine instead of torch's product.

    Measured with one thread and written beside the compiled library, so that later processes choose the same.
    """
    path = library_path(c_kernel.SOURCE)
    # torch's speed depends on its version and on the instructions that it uses.
    key = hashlib.sha256(f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode()).hexdigest()[:8]
    return _decide(path.with_name(f"{path.stem}-{key}.choice"), thread_time)


def _decide(path: Path, clock: Callable[[], float]) -> bool:
    """The choice that is written in a file; if there is none, the measured one, which is written."""
    known = _read(path)
    if known is not None:
        return known
    chosen = ratio(clock) <= _MAX_RATIO
    # Without a writable cache folder, the choice is this process's own.
    with suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        temporary.write_text("kernel\n" if chosen else "torch\n")
        with suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename, fails if another process was first: its choice holds for all
    known = _read(path)
    return chosen if known is None else known


def _read(path: Path) -> bool | None:
    with suppress(OSError):
        return {"kernel": True, "torch": False}.get(path.read_text().strip())
    return None


def ratio(clock: Callable[[], float]) -> float:
    """Seconds of the kernel over those of torch.mm: geometric mean over ROWS, with one thread.

    For each of them the fastest of some alternating calls counts, because other load only slows a call down.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weight = torch.linspace(-1, 1, _SIZE * _SIZE).view(_SIZE, _SIZE).bfloat16()
        packed, transposed = pack_panels(weight), weight.float().t().contiguous()
        products: list[Callable[[Tensor], Tensor]] = [
            lambda x: c_kernel.skinny_gemm(x, packed, _SIZE),
            lambda x: torch.mm(x, transposed),
        ]
        logarithms = []
        for rows in ROWS:
            x = torch.linspace(-1, 1, rows * _SIZE).view(rows, _SIZE)
            seconds: list[list[float]] = [[], []]
            for repeat in range(_REPEATS + 1):
                for product, measured in zip(products, seconds, strict=True):
                    started = clock()
                    product(x)
                    if repeat:  # the first call warms up
                        measured.append(clock() - started)
            kernel, torch_mm = map(min, seconds)
            logarithms.append(log(kernel / torch_mm))
        return float(torch.tensor(logarithms).mean().exp())
    finally:
        torch.set_num_threads(threads)
