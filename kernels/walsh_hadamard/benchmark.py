"""Benchmark cases of the Walsh-Hadamard transform: heads of 128, hidden and feed-forward sizes of 8B and 70B models."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.timing import Case, Operands
from hasten.kernels.walsh_hadamard import reference, triton_kernel

_SHAPES = [(64 * 8, 128), (64, 4096), (64, 8192), (4096, 4096), (4096, 14_336)]
_DRY_SHAPES = [(2, 64), (1, 56)]


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each shape, ROWSxCOLUMNS."""
    dtype = torch.float32 if dry else torch.bfloat16
    for rows, columns in _DRY_SHAPES if dry else _SHAPES:
        yield Case(
            op="walsh_hadamard",
            shape=f"{rows}x{columns}",
            dtype=str(dtype).removeprefix("torch."),
            device_type=device.type,
            operands=partial(_operands, rows, columns, dtype),
            kernel=partial(_run, triton_kernel.walsh_hadamard),
            reference=partial(_run, reference.walsh_hadamard),
            nbytes=2 * rows * columns * dtype.itemsize,
            flops=rows * columns * columns.bit_length(),
            rtol=2**-7,
            atol=1e-4,
            peers={"torch matmul": torch.matmul},
        )


def _operands(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    x = torch.randn(rows, columns, generator=generator, device=device).to(dtype)
    # Of the peer, which multiplies by the whole matrix.
    matrix = reference.walsh_hadamard(torch.eye(columns, device=device))[0]
    return x, matrix.to(dtype)


def _run(transform: Callable[[Tensor], tuple[Tensor, Tensor | None]], x: Tensor, matrix: Tensor) -> Tensor:
    return transform(x)[0]
