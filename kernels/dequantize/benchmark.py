"""Benchmark cases of dequantization: weight shapes of common models, with groups of 64 and 128 and one scale a row."""

from collections.abc import Iterator
from functools import partial

import torch

from hasten.kernels.dequantize import reference, triton_kernel
from hasten.kernels.timing import Case, Operands

_SHAPES = [(4096, 4096, 128), (14336, 4096, 128), (4096, 14336, 64), (8192, 28672, 128), (4096, 4096, 4096)]
_DRY_SHAPES = [(16, 256, 64), (16, 192, 192)]


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each shape, ROWSxCOLUMNS/GROUP_SIZE, in two dtypes."""
    for rows, columns, group_size in _DRY_SHAPES if dry else _SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            weights, groups = rows * columns, rows * (columns // group_size)
            yield Case(
                op="dequantize",
                shape=f"{rows}x{columns}/{group_size}",
                dtype=str(dtype).removeprefix("torch."),
                device_type=device.type,
                operands=partial(_operands, rows, columns, columns // group_size, dtype),
                kernel=triton_kernel.dequantize,
                reference=reference.dequantize,
                nbytes=weights * (1 + dtype.itemsize) + groups * (1 + dtype.itemsize),
                flops=2 * weights,
                # Triton's interpreter truncates float32 to bfloat16 where hardware rounds.
                rtol=2**-7 if dry and dtype == torch.bfloat16 else 0.0,
            )


def _operands(
    rows: int, columns: int, groups: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    def integers(width: int) -> torch.Tensor:
        return torch.randint(0, 16, (rows, width), generator=generator, dtype=torch.uint8, device=device)

    scale = (torch.rand(rows, groups, generator=generator, device=device) + 0.01).to(dtype)
    return integers(columns), scale, integers(groups)
