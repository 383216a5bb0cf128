"""Gated activation with quantization."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from hasten.kernels.gated_activation import ACTIVATIONS, reference, triton_kernel
from tests.kernels.ops.compilation import Compilation
from tests.kernels.poison import poisoned
from tests.kernels.quantized_rows import check_codes

SIZES = [(2, 37), (1, 1100)]
LONG_SIZES = [(5, 14_336), (2, 28_672)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = [None, torch.int8, torch.float8_e4m3fn]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    sizes = SIZES if device == "cpu" else SIZES + LONG_SIZES
    for size, dtype, codes, activation in product(sizes, DTYPES, CODES, ACTIVATIONS):
        if device != "cpu" or dtype != torch.bfloat16:
            yield f"{size} {dtype} {codes} {activation}", partial(check, size, dtype, codes, activation, device)


def compilations() -> list[Compilation]:
    """Both kernels, with each activation and type of codes once."""
    types = {"x": "*bf16", "values": "*bf16", "columns": "i32", "stride": "i32"}
    types |= {"GELU": "constexpr", "BLOCK": "constexpr"}
    wide = {"x": "*bf16", "values": "*i8", "scale": "*fp32"} | {name: types[name] for name in list(types)[2:]}
    kernel, options = triton_kernel.quantizing_kernel, {"num_warps": 8}
    constants = {"GELU": False, "BLOCK": 4096}
    return [
        Compilation("plain", triton_kernel.kernel, types, {"GELU": True, "BLOCK": 1024}, targets=("sm_90", "gfx942")),
        Compilation("int8", kernel, wide, constants, options, targets=("sm_80", "gfx942")),
        Compilation("e4m3", kernel, wide | {"values": "*fp8e4nv"}, constants, options, targets=("sm_100",)),
    ]


def check(size: tuple[int, int], dtype: torch.dtype, codes: torch.dtype | None, activation: str, device: str) -> None:
    """AssertionError where the product or its codes are not the reference's in float64."""
    rows, columns = size
    generator = torch.Generator().manual_seed(columns)
    # Gates of up to about 40, at which a careless exponential overflows in float16.
    x = 10 * torch.randn(rows, 2 * columns + 3, generator=generator)
    x = x.to(dtype).to(device)[:, : 2 * columns]
    x[0, 0] = -200.0
    with poisoned():
        values, scale = triton_kernel.gated_activation(x, activation, codes)
    exact, _ = reference.gated_activation(x.double(), activation)
    if codes is None:
        # One rounding to the dtype; float16 has a smallest step of 2**-24.
        tolerance = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(values.double(), exact, rtol=tolerance, atol=1e-7)
    else:
        assert values.dtype == codes
        check_codes(values, scale, exact)
