"""Fast Walsh-Hadamard transform with quantization."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from hasten.kernels.walsh_hadamard import reference, triton_kernel
from tests.kernels.ops.compilation import Compilation
from tests.kernels.poison import poisoned
from tests.kernels.quantized_rows import check_codes

SIZES = [(5, 1), (3, 64), (2, 48), (1, 40), (2, 28), (1, 4096)]
LONG_SIZES = [(1000, 128), (5, 16_384), (3, 14_336), (3, 5120)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = [None, torch.int8, torch.float8_e4m3fn]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    for size in SIZES if device == "cpu" else SIZES + LONG_SIZES:
        for dtype in DTYPES:
            for codes in CODES:
                if device != "cpu" or dtype != torch.bfloat16:
                    yield f"{size} {dtype} {codes}", partial(check, *size, dtype, codes, device)


def compilations() -> list[Compilation]:
    """Heads of 128, rows of a power of 2, and rows with a factor of 28."""
    types = {"x": "*bf16", "matrix": "*fp32", "values": "*bf16", "scale": "constexpr", "rows": "i32", "stride": "i32"}
    types |= {"factor": "fp32"} | dict.fromkeys(["ORDER", "TILE", "POWER", "STAGES"], "constexpr")
    heads = {"scale": None, "ORDER": 1, "TILE": 16, "POWER": 128, "STAGES": 7}
    rows = {"ORDER": 1, "TILE": 1, "POWER": 4096, "STAGES": 12}
    factor = {"ORDER": 28, "TILE": 32, "POWER": 512, "STAGES": 9}
    codes, kernel = types | {"values": "*i8", "scale": "*fp32"}, triton_kernel.kernel
    return [
        Compilation("heads", kernel, types, heads, {"num_warps": 4}, targets=("sm_90", "gfx942")),
        Compilation("rows", kernel, codes, rows, {"num_warps": 4}, targets=("sm_80", "sm_100")),
        Compilation("factor", kernel, codes, factor, {"num_warps": 16}, targets=("sm_90", "gfx942")),
    ]


def check(rows: int, columns: int, dtype: torch.dtype, codes: torch.dtype | None, device: str) -> None:
    """AssertionError where the transform or its codes are not the reference's in float64."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns + 3, generator=generator).to(dtype).to(device)[:, :columns]
    with poisoned():
        values, scale = triton_kernel.walsh_hadamard(x, codes)
    exact, _ = reference.walsh_hadamard(x.double())
    if codes is None:
        # One rounding to the dtype, after float32 sums of up to 16384 numbers.
        tolerance = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(values.double(), exact, rtol=tolerance, atol=1e-6)
    else:
        assert values.dtype == codes
        check_codes(values, scale, exact)
