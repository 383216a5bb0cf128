"""Products with weights of 8- and 4-bit floats."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from hasten.kernels.float_gemm import reference, triton_kernel
from hasten.kernels.float_gemm.layout import FloatWeight
from hasten.kernels.packed_gemm.choice import Configuration, Gemv, Matmul
from tests.kernels.ops.compilation import Compilation
from tests.kernels.ops.packed_gemm import assert_product, moved, of_gemv, of_matmul, poisoned_outputs

FORMATS = ("tensor", "channel", "block", "mxfp4", "nvfp4")
# Rows of x, rows and columns, and how they are multiplied. 130 rows have two rows of blocks, 200 columns two columns.
PRODUCTS: list[tuple[int, int, int, Configuration]] = [
    (1, 11, 64, Gemv(1, 1)),
    (3, 130, 224, Gemv(4, 2, 2)),
    (5, 18, 96, Matmul(16, 16, 64, 4, 2)),
    (17, 130, 160, Matmul(64, 16, 64, 4, 2, 2)),
]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check; bfloat16 on a GPU only."""
    dtypes = [torch.float16, torch.float32] + ([torch.bfloat16] if device.startswith("cuda") else [])
    for number, (kind, sizes) in enumerate(product(FORMATS, PRODUCTS)):
        # The dtypes differ in how x is read, which the checks of packed_gemm cover. Each check is compiled on a GPU.
        dtype = dtypes[number % len(dtypes)]
        yield f"{kind} {sizes} {dtype}", partial(check, kind, *sizes, dtype, device)
    yield "odd columns", partial(check, "channel", 2, 9, 70, Gemv(1, 1), torch.float16, device)
    yield "odd columns, many rows", partial(check, "block", 20, 9, 70, Matmul(16, 16, 64, 4, 2), torch.float16, device)


def weight_of(kind: str, rows: int, columns: int) -> FloatWeight:
    """A random weight, seeded by its size, on the CPU."""
    generator = torch.Generator().manual_seed(rows + columns)

    def scales(shape: tuple[int, int]) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.1

    if kind in ("mxfp4", "nvfp4"):
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
        if kind == "mxfp4":
            exponents = torch.randint(120, 131, (rows, columns // 32), generator=generator, dtype=torch.uint8)
            return FloatWeight(codes, exponents)
        scale = (100 * scales((rows, columns // 16))).to(torch.float8_e4m3fn)
        return FloatWeight(codes, scale, torch.tensor([37.5]))
    # Subnormal codes too; 448 is the largest.
    magnitudes = 2 ** (18 * torch.rand(rows, columns, generator=generator) - 10)
    signs = torch.randn(rows, columns, generator=generator).sign()
    shape = {"tensor": (1, 1), "channel": (rows, 1), "block": (-(-rows // 128), -(-columns // 128))}[kind]
    return FloatWeight((magnitudes * signs).to(torch.float8_e4m3fn), scales(shape))


def check(kind: str, n: int, rows: int, columns: int, chosen: Configuration, dtype: torch.dtype, device: str) -> None:
    """AssertionError where the kernel on device differs from the reference in float64 on the CPU."""
    weight = weight_of(kind, rows, columns)
    x = (torch.randn(n, columns, generator=torch.Generator().manual_seed(n)) / 64).to(dtype)
    with poisoned_outputs():
        found = triton_kernel.float_gemm(x.to(device), moved(weight, device), chosen)
    assert_product(found, x, reference.dequantize(weight, torch.float64))


def compilations() -> list[Compilation]:
    """One row and 64 rows of each width."""
    fp8 = {"FLOAT": True, "MIDDLE": 0.0, "FACTOR": 2.0**8, "ROW_GROUP": 128}
    nvfp4 = {"FLOAT": True, "MIDDLE": 0.0, "FACTOR": 2.0**14, "SCALE": "e4m3", "ALPHA": True, "GROUP": 2}
    return [
        of_gemv("one row, fp8", 8, 1, 4, 8, **fp8),
        of_gemv("one row, nvfp4", 4, 1, 4, 8, **nvfp4, ONE_SCALE=False),
        of_matmul("64 rows, fp8", 8, Matmul(128, 64, 64, 8, 3), **fp8),
        of_matmul("64 rows, nvfp4", 4, Matmul(128, 64, 128, 8, 3), **nvfp4),
        of_matmul("64 rows, mxfp4", 4, Matmul(128, 64, 128, 8, 3), **nvfp4 | {"SCALE": "e8m0", "GROUP": 4}),
    ]
