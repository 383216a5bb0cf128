"""Benchmark cases of products with weights of signs: two-binary with groups of 64, one plane with a low-rank part."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.sign_gemm import reference, triton_kernel
from hasten.kernels.sign_gemm.layout import SignWeight, pack_signs
from hasten.kernels.timing import Case, Operands

_SHAPES = [(planes, rank, n, 14336, 4096) for planes, rank in ((2, 0), (1, 16)) for n in (1, 64)]
_DRY_SHAPES = [(2, 0, 1, 16, 128), (1, 4, 20, 16, 64)]
_GROUP = 64


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each number of planes, rank and shape."""
    dtype = torch.float16 if dry else torch.bfloat16  # the interpreter computes wrongly with bfloat16
    for planes, rank, n, rows, columns in _DRY_SHAPES if dry else _SHAPES:
        weight_bytes = planes * rows * (columns // 8 + columns // _GROUP * dtype.itemsize)
        weight_bytes += rank * (rows + columns) * dtype.itemsize
        yield Case(
            op="sign_gemm",
            shape=f"{n}x{columns} {planes} planes, rank {rank} {rows}x{columns}/{_GROUP}",
            dtype=str(dtype).removeprefix("torch."),
            device_type=device.type,
            operands=partial(_operands, planes, rank, n, rows, columns, dtype),
            kernel=_kernel,
            reference=_reference,
            nbytes=weight_bytes + n * (columns + rows) * dtype.itemsize,
            flops=2 * n * (rows * columns + rank * (rows + columns)),
            # Outputs have a standard deviation of about one; weights are rounded to the dtype of x.
            rtol=2**-6,
            atol=2**-4,
            peers={"torch.mm of dequantized": _mm},
            prepare=_tune,
        )


def _operands(
    planes: int,
    rank: int,
    n: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> Operands:
    """x, the dense weight, signs, scale, and the two factors of a low-rank part."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) / columns**0.5

    x = torch.randn(n, columns, generator=generator, device=device).to(dtype)
    parts = [pack_signs(normal(rows, planes, columns) > 0), normal(rows, planes, columns // _GROUP).to(dtype)]
    if rank:
        parts += [(normal(rows, rank) * rank**-0.5 * columns**0.5).to(dtype), normal(rank, columns).to(dtype)]
    return x, reference.dequantize(_weight(x, *parts)).to(dtype), *parts


def _weight(
    x: Tensor, signs: Tensor, scale: Tensor, left: Tensor | None = None, right: Tensor | None = None
) -> SignWeight:
    return SignWeight(signs, scale, x.shape[1], left=left, right=right)


def _tune(x: Tensor, dense: Tensor, *parts: Tensor) -> None:
    triton_kernel.tune(x, _weight(x, *parts))


def _kernel(x: Tensor, dense: Tensor, *parts: Tensor) -> Tensor:
    return triton_kernel.sign_gemm(x, _weight(x, *parts))


def _reference(x: Tensor, dense: Tensor, *parts: Tensor) -> Tensor:
    return reference.sign_gemm(x, _weight(x, *parts))


def _mm(x: Tensor, dense: Tensor, *_: Tensor) -> Tensor:
    return x @ dense.T
