"""Benchmark cases of group statistics: weight shapes of 8B and 70B models."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.group_statistics import reference, triton_kernel
from hasten.kernels.timing import Case, Operands

_SHAPES = [(4096, 4096, 128), (14_336, 4096, 64), (8192, 28_672, 128), (4096, 14_336, 14_336)]
_DRY_SHAPES = [(4, 96, 32)]


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each shape, ROWSxCOLUMNS/GROUP_SIZE."""
    dtype = torch.float32 if dry else torch.bfloat16
    for rows, columns, group_size in _DRY_SHAPES if dry else _SHAPES:
        elements = rows * columns
        yield Case(
            op="group_statistics",
            shape=f"{rows}x{columns}/{group_size}",
            dtype=str(dtype).removeprefix("torch."),
            device_type=device.type,
            operands=partial(_operands, rows, columns, dtype),
            kernel=lambda x, size=group_size: torch.stack(triton_kernel.group_statistics(x, size)),
            reference=lambda x, size=group_size: torch.stack(reference.group_statistics(x, size)),
            nbytes=elements * dtype.itemsize + 20 * elements // group_size,
            flops=5 * elements,
            rtol=1e-4,
            atol=1e-3,
            peers={"torch aminmax": partial(_aminmax, group_size)},
        )


def _operands(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    return (torch.randn(rows, columns, generator=generator, device=device).to(dtype),)


def _aminmax(group_size: int, x: Tensor) -> object:
    return x.unflatten(1, (-1, group_size)).aminmax(dim=-1)
