"""RMS norm with residual and quantization."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from hasten.kernels.norm_quantize import reference, triton_kernel
from tests.kernels.ops.compilation import Compilation
from tests.kernels.poison import poisoned
from tests.kernels.quantized_rows import check_codes

SIZES = [(3, 37), (2, 576)]
LONG_SIZES = [(5, 4096), (2, 5120), (3, 16_384)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = [None, torch.int8, torch.float8_e4m3fn]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    sizes = SIZES if device == "cpu" else SIZES + LONG_SIZES
    for size, dtype, codes, adds in product(sizes, DTYPES, CODES, (False, True)):
        if device != "cpu" or dtype != torch.bfloat16:
            yield f"{size} {dtype} {codes} residual={adds}", partial(check, size, dtype, codes, adds, device)


def compilations() -> list[Compilation]:
    """The norm alone, and with everything in both types of codes."""
    types = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "values": "*i8", "scale": "*fp32", "summed": "*bf16"}
    types |= {"columns": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32", "BLOCK": "constexpr"}
    plain = types | {"values": "*bf16", "residual": "constexpr", "scale": "constexpr", "summed": "constexpr"}
    absent = {"residual": None, "scale": None, "summed": None}
    kernel, block, options = triton_kernel.kernel, {"BLOCK": 8192}, {"num_warps": 8}
    return [
        Compilation("plain", kernel, plain, block | absent, options, targets=("sm_90",)),
        Compilation("int8", kernel, types, block, options, targets=("sm_80", "gfx942")),
        # sm_80 has no type of e4m3.
        Compilation("e4m3", kernel, types | {"values": "*fp8e4nv"}, block, options, targets=("sm_90", "sm_100")),
    ]


def check(size: tuple[int, int], dtype: torch.dtype, codes: torch.dtype | None, adds: bool, device: str) -> None:
    """AssertionError where the norm or its codes are not the reference's in float64."""
    rows, columns = size
    generator = torch.Generator().manual_seed(columns)
    x, residual = torch.randn(2, rows, columns + 3, generator=generator).to(dtype).to(device)[..., :columns]
    x[-1] = 0 if not adds else x[-1]
    weight = torch.rand(columns, generator=generator).to(dtype).to(device)
    with poisoned():
        found = triton_kernel.norm_quantize(x, weight, 1e-6, residual if adds else None, codes)
    summed = x
    if adds:
        summed = x + residual
        assert torch.equal(found.residual, summed)
    exact = reference.norm_quantize(summed.double(), weight.double(), 1e-6).values
    if codes is None:
        # One rounding to the dtype, after float32 sums.
        tolerance = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(found.values.double(), exact, rtol=tolerance, atol=1e-7)
    else:
        assert found.values.dtype == codes
        check_codes(found.values, found.scale, exact)
