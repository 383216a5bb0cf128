"""Benchmark cases of grid_rounding, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.grid_rounding import Points, c_kernel, reference
from hasten.kernels.timing import Case, Operands, Skipped

# Integers in groups of 64, e4m3 in rows, e2m1 in groups of 16.
_GRIDS = [(Points("int", 4), 64), (Points("float", 8), 4096), (Points("float", 4), 16)]
_ROWS, _COLUMNS = 1024, 4096
# Operations for a number: division, both ends, two additions, product, difference, square, sum.
_OPERATIONS = 9


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """The search's loss, weights to codes, and inputs of a layer, on each grid."""
    if not c_kernel.is_available():
        yield Skipped("grid_rounding", "there is no C compiler")
        return
    rows = 16 if dry else _ROWS
    for points, size in _GRIDS:
        shape = f"{rows}x{_COLUMNS} {points.kind}{points.bits} groups of {size}"
        weights = partial(_weights, rows, size, points)
        case = partial(Case, op="grid_rounding", device_type="cpu", flops=_OPERATIONS * rows * _COLUMNS)
        for op, written in (("losses", 0), ("encode", 1)):
            yield case(
                shape=f"{op} {shape}",
                dtype="float32",
                operands=weights,
                kernel=partial(getattr(c_kernel, op), points=points),
                reference=partial(getattr(reference, op), points=points),
                nbytes=(4 + written) * rows * _COLUMNS,
                # A number that is nearly on the grid leaves an error of a rounding.
                rtol=1e-3 * (not written),
                atol=1e-6 * (not written),
            )
        ends = (-points.top, points.top) if points.kind == "float" else (-8.0, 7.0)
        yield case(
            shape=f"inputs {shape}",
            dtype="bfloat16",
            operands=partial(_inputs, rows, size, points),
            kernel=partial(_round, c_kernel.round_scaled, points, *ends),
            reference=partial(_round, reference.round_scaled, points, *ends),
            nbytes=4 * rows * _COLUMNS,
        )


def _weights(rows: int, size: int, points: Points, generator: torch.Generator, device: torch.device) -> Operands:
    groups = torch.randn(rows, _COLUMNS // size, size, generator=generator)
    scale = groups.abs().amax(-1) / points.top
    return groups, scale, torch.full_like(scale, 2.0 ** (points.bits - 1))


def _inputs(rows: int, size: int, points: Points, generator: torch.Generator, device: torch.device) -> Operands:
    groups = torch.randn(rows, _COLUMNS // size, size, generator=generator).bfloat16()
    return groups, reference.absmax(groups) / points.top


def _round(
    function: Callable[..., Tensor], points: Points, low: float, high: float, x: Tensor, scale: Tensor
) -> Tensor:
    return function(x, scale, points.kind, points.bits, low, high)
