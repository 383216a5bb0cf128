"""Benchmark cases of products with weights of small floats: shapes of an 8B model, one row and 64 rows."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.float_gemm import reference, triton_kernel
from hasten.kernels.float_gemm.layout import FloatWeight
from hasten.kernels.timing import Case, Operands

_SHAPES = [(kind, n, 14336, 4096) for kind in ("fp8", "mxfp4", "nvfp4") for n in (1, 64)]
_DRY_SHAPES = [("fp8", 1, 16, 128), ("nvfp4", 20, 32, 64)]


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each format and shape; FP8 with a scale per row."""
    dtype = torch.float16 if dry else torch.bfloat16  # the interpreter computes wrongly with bfloat16
    for kind, n, rows, columns in _DRY_SHAPES if dry else _SHAPES:
        peers: dict[str, Callable[..., Tensor]] = {"torch.mm of dequantized": _mm}
        if kind == "fp8":
            peers["torch._scaled_mm, x in fp8"] = _scaled_mm
        yield Case(
            op="float_gemm",
            shape=f"{n}x{columns} {kind} {rows}x{columns}",
            dtype=str(dtype).removeprefix("torch."),
            device_type=device.type,
            operands=partial(_operands, kind, n, rows, columns, dtype),
            kernel=_kernel,
            reference=_reference,
            nbytes=_weight_bytes(kind, rows, columns) + n * (columns + rows) * dtype.itemsize,
            flops=2 * n * rows * columns,
            # Outputs have a standard deviation of about one; weights are rounded to the dtype of x.
            rtol=2**-7,
            atol=2**-5,
            peers=peers,
            prepare=_tune,
        )


def _weight_bytes(kind: str, rows: int, columns: int) -> int:
    if kind == "fp8":
        return rows * columns + 4 * rows
    return rows * (columns // 2 + columns // (32 if kind == "mxfp4" else 16))


def _operands(
    kind: str, n: int, rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    """x, the dense weight, codes, scale, and for NVFP4 the global scale."""
    x = torch.randn(n, columns, generator=generator, device=device).to(dtype)
    parts: tuple[Tensor, ...]
    if kind == "fp8":
        codes = (100 * torch.randn(rows, columns, generator=generator, device=device)).clamp(-448, 448)
        scale = torch.rand(rows, 1, generator=generator, device=device) / (60 * columns**0.5)
        parts = (codes.to(torch.float8_e4m3fn), scale)
    else:
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8, device=device)
        if kind == "mxfp4":
            exponents = torch.randint(118, 120, (rows, columns // 32), generator=generator, device=device)
            parts = (codes, exponents.to(torch.uint8))
        else:
            scale = 100 * torch.rand(rows, columns // 16, generator=generator, device=device)
            parts = (codes, scale.to(torch.float8_e4m3fn), torch.tensor([200 * columns**0.5], device=device))
    return x, reference.dequantize(FloatWeight(*parts)).to(dtype), *parts


def _tune(x: Tensor, dense: Tensor, *parts: Tensor) -> None:
    triton_kernel.tune(x, FloatWeight(*parts))


def _kernel(x: Tensor, dense: Tensor, *parts: Tensor) -> Tensor:
    return triton_kernel.float_gemm(x, FloatWeight(*parts))


def _reference(x: Tensor, dense: Tensor, *parts: Tensor) -> Tensor:
    return reference.float_gemm(x, FloatWeight(*parts))


def _mm(x: Tensor, dense: Tensor, *_: Tensor) -> Tensor:
    return x @ dense.T


def _scaled_mm(x: Tensor, dense: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    # It needs activations in fp8, too; their quantization is not part of the product's time in a model that fuses it.
    ones = torch.ones(len(x), 1, device=x.device)
    return torch._scaled_mm(x.to(torch.float8_e4m3fn), codes.T, ones, scale.T, out_dtype=x.dtype)
