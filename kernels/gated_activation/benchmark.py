"""Benchmark cases of the gated activation: feed-forward widths of 8B and 70B models."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.gated_activation import reference, triton_kernel
from hasten.kernels.timing import Case, Operands

_SHAPES = [(1, 14_336), (64, 14_336), (4096, 14_336), (64, 28_672)]
_DRY_SHAPES = [(2, 96)]


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each shape, ROWSxWIDTH, and type of codes."""
    dtype = torch.float32 if dry else torch.bfloat16
    for rows, columns in _DRY_SHAPES if dry else _SHAPES:
        for codes in (None, torch.int8):
            size = rows * columns
            yield Case(
                op="gated_activation",
                shape=f"{rows}x{columns}" + ("" if codes is None else " int8"),
                dtype=str(dtype).removeprefix("torch."),
                device_type=device.type,
                operands=partial(_operands, rows, columns, dtype),
                kernel=partial(_run, triton_kernel.gated_activation, codes),
                reference=partial(_run, reference.gated_activation, codes),
                nbytes=size * (2 * dtype.itemsize + (codes or dtype).itemsize),
                flops=6 * size,
                # Of int8, either neighbour is right near the middle between them.
                rtol=2**-7 if codes is None else 0.0,
                atol=1e-3 if codes is None else 1.0,
                peers={"torch": _torch_product} if codes is None else {},
            )


def _operands(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    return (torch.randn(rows, 2 * columns, generator=generator, device=device).to(dtype),)


def _run(function: Callable[..., tuple[Tensor, Tensor | None]], codes: torch.dtype | None, x: Tensor) -> Tensor:
    return function(x, "silu", codes)[0]


def _torch_product(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
