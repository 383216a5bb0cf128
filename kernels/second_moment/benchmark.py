"""Benchmark cases of second_moment: the C kernel on the CPU, also with --device cuda, and the Triton kernel there."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.second_moment import c_kernel, panel_bounds, reference, triton_kernel
from hasten.kernels.timing import Case, Operands, Skipped

_COLUMNS, _GPU_COLUMNS, _TOKENS, _WIDTH = (576, 4096), (576, 4096, 14_336), 2048, 256
_DRY_COLUMNS, _DRY_TOKENS = (70,), 40


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A case for each kernel, type and number of columns, TOKENSxCOLUMNS."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if c_kernel.is_faster(dtype):
            for columns in _COLUMNS[:1] if dry else _COLUMNS:
                yield _case("cpu", _TOKENS, columns, dtype, c_kernel.add)
        else:
            yield Skipped("second_moment", f"torch's product of {name} is used on this processor")
        # The interpreter computes bfloat16 wrongly.
        dtype = torch.float16 if dry and dtype == torch.bfloat16 else dtype
        for columns in _DRY_COLUMNS if dry else _GPU_COLUMNS:
            yield _case(device.type, _DRY_TOKENS if dry else _TOKENS, columns, dtype, triton_kernel.add)


def _case(
    device_type: str, tokens: int, columns: int, dtype: torch.dtype, add: Callable[[Tensor, Tensor, int], None]
) -> Case:
    return Case(
        op="second_moment",
        shape=f"{tokens}x{columns}",
        dtype=str(dtype).removeprefix("torch."),
        device_type=device_type,
        operands=partial(_operands, tokens, columns, dtype),
        kernel=partial(_sums, add),
        reference=partial(_sums, reference.add),
        nbytes=tokens * columns * dtype.itemsize + 4 * _size(columns),
        flops=2 * tokens * _size(columns),
        # Sums of 2048 products of standard normal numbers, in different orders.
        rtol=1e-4,
        atol=1e-3,
    )


def _size(columns: int) -> int:
    return sum((stop - start) * stop for start, stop in panel_bounds(columns, _WIDTH))


def _operands(
    tokens: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    x = torch.randn(tokens, columns, generator=generator, device=device)
    return x.to(dtype), torch.zeros(_size(columns), device=device)


def _sums(add: Callable[[Tensor, Tensor, int], None], x: Tensor, sums: Tensor) -> Tensor:
    sums.zero_()
    add(sums, x, _WIDTH)
    return sums
