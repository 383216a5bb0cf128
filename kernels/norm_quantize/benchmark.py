"""Benchmark cases of the norm: hidden sizes of 8B and 70B models, alone, and with residual and codes."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.norm_quantize import reference, triton_kernel
from hasten.kernels.norm_quantize.reference import Normalised
from hasten.kernels.timing import Case, Operands

_SHAPES = [(1, 4096), (64, 4096), (4096, 4096), (64, 8192)]
_DRY_SHAPES = [(2, 96)]
_EPS = 1e-5


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each shape, ROWSxCOLUMNS, and type of codes."""
    dtype = torch.float32 if dry else torch.bfloat16
    for rows, columns in _DRY_SHAPES if dry else _SHAPES:
        for codes in (None, torch.int8, torch.float8_e4m3fn):
            size = rows * columns
            out = size * (codes or dtype).itemsize + 4 * rows
            yield Case(
                op="norm_quantize",
                shape=f"{rows}x{columns}"
                + ("" if codes is None else f" residual, {str(codes).removeprefix('torch.')}"),
                dtype=str(dtype).removeprefix("torch."),
                device_type=device.type,
                operands=partial(_operands, rows, columns, dtype),
                kernel=partial(_run, triton_kernel.norm_quantize, codes),
                reference=partial(_run, reference.norm_quantize, codes),
                nbytes=out + size * dtype.itemsize * (1 if codes is None else 3),
                flops=4 * size,
                rtol=2**-7,
                atol=1e-3,
                peers={"torch": _torch_norm} if codes is None else {},
            )


def _operands(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    x, residual = torch.randn(2, rows, columns, generator=generator, device=device).to(dtype)
    return x, residual, torch.rand(columns, generator=generator, device=device).to(dtype)


def _run(
    norm: Callable[..., Normalised], codes: torch.dtype | None, x: Tensor, residual: Tensor, weight: Tensor
) -> Tensor:
    found = norm(x, weight, _EPS, None if codes is None else residual, codes)
    # Codes may differ by one where a quotient is in the middle between two.
    return found.values if found.scale is None else found.scale


def _torch_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, _EPS)
