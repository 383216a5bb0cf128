"""Benchmark cases of nearest_plane, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.grid_rounding import Points
from hasten.kernels.nearest_plane import Plane, c_kernel, reference
from hasten.kernels.timing import Case, Operands, Skipped

_COLUMNS, _ROWS = 128, 4096


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A block of columns on each kind of grid."""
    if not c_kernel.is_available():
        yield Skipped("nearest_plane", "there is no C compiler")
        return
    rows = 64 if dry else _ROWS
    for points in (Points("int", 4), Points("float", 8)):
        yield Case(
            op="nearest_plane",
            shape=f"{_COLUMNS}x{rows} {points.kind}{points.bits}",
            dtype="float32",
            device_type="cpu",
            operands=partial(_operands, rows, points),
            kernel=partial(_residual, c_kernel.visit, points),
            reference=partial(_residual, reference.visit, points),
            # Weights, what is carried, residual, error and codes; what is carried stays in the cache.
            nbytes=17 * _COLUMNS * rows,
            flops=_COLUMNS * _COLUMNS * rows,
            # Sums in another order may round a number to another code: compared by their mean.
            rtol=1e-2,
        )


def _operands(rows: int, points: Points, generator: torch.Generator, device: torch.device) -> Operands:
    target = torch.randn(_COLUMNS, rows, generator=generator)
    lower = 0.03 * torch.randn(_COLUMNS, _COLUMNS, generator=generator)
    top = points.top if points.kind == "float" else points.top // 2
    return target, lower.tril(), target.abs().amax(0, keepdim=True) / top


def _residual(visit: Callable[..., None], points: Points, target: Tensor, lower: Tensor, scales: Tensor) -> Tensor:
    """Mean squared residual."""
    groups = torch.zeros(len(target), dtype=torch.long)
    codes = torch.empty(target.shape, dtype=torch.uint8)
    parts = [torch.zeros_like(target) for _ in range(3)]
    zeros = torch.full_like(scales, 2.0 ** (points.bits - 1))
    carried, residual, error = parts
    plane = Plane(target, lower, scales, zeros, groups, points, torch.float32, carried, codes, residual, error)
    visit(plane, 0, len(target))
    return residual.square().mean()
