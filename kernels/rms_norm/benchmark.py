"""Benchmark cases of rms_norm, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Iterator
from functools import partial

import torch

from hasten.kernels.rms_norm import c_kernel, reference
from hasten.kernels.timing import Case, Operands, Skipped

_EPS = 1e-5


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A case for each shape, ROWSxCOLUMNS."""
    if not c_kernel.is_available():
        yield Skipped("rms_norm", "there is no C compiler")
        return
    for rows, columns in [(1, 576)] if dry else [(1, 576), (64, 576), (1, 4096), (64, 8192)]:
        yield Case(
            op="rms_norm",
            shape=f"{rows}x{columns}",
            dtype="float32",
            device_type="cpu",
            operands=partial(_operands, rows, columns),
            kernel=partial(c_kernel.rms_norm, eps=_EPS),
            reference=partial(reference.rms_norm, eps=_EPS),
            nbytes=8 * rows * columns,
            flops=4 * rows * columns,
            rtol=1e-5,
            atol=1e-6,
            peers={"torch": lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, _EPS)},
        )


def _operands(rows: int, columns: int, generator: torch.Generator, device: torch.device) -> Operands:
    return torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator)
