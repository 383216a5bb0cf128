"""Benchmark cases of second_moment, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from hasten.kernels.second_moment import c_kernel, panel_bounds, reference
from hasten.kernels.timing import Case, Operands, Skipped

_COLUMNS, _TOKENS, _WIDTH = (576, 4096), 2048, 256


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A case for each type and number of columns, TOKENSxCOLUMNS."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if not c_kernel.is_faster(dtype):
            yield Skipped("second_moment", f"torch's product of {name} is used on this processor")
            continue
        for columns in _COLUMNS[:1] if dry else _COLUMNS:
            yield Case(
                op="second_moment",
                shape=f"{_TOKENS}x{columns}",
                dtype=name,
                device_type="cpu",
                operands=partial(_operands, columns, dtype),
                kernel=partial(_sums, c_kernel.add),
                reference=partial(_sums, reference.add),
                nbytes=_TOKENS * columns * dtype.itemsize + 4 * _size(columns),
                flops=2 * _TOKENS * _size(columns),
                # Sums of 2048 products of standard normal numbers, in different orders.
                rtol=1e-4,
                atol=1e-3,
            )


def _size(columns: int) -> int:
    return sum((stop - start) * stop for start, stop in panel_bounds(columns, _WIDTH))


def _operands(columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Operands:
    return torch.randn(_TOKENS, columns, generator=generator).to(dtype), torch.zeros(_size(columns))


def _sums(add: Callable[[torch.Tensor, torch.Tensor, int], None], x: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    sums.zero_()
    add(sums, x, _WIDTH)
    return sums
