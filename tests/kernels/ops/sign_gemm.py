"""Products with weights of signs: planes, scales per row and group, signs of -1 and 1 and of 0 and 1, low rank."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from hasten.kernels.packed_gemm.choice import Configuration, Gemv, Matmul
from hasten.kernels.sign_gemm import reference, triton_kernel
from hasten.kernels.sign_gemm.layout import SignWeight, pack_signs
from tests.kernels.ops.compilation import Compilation
from tests.kernels.ops.packed_gemm import CUDA, assert_product, moved, of_gemv, of_matmul, poisoned_outputs

# Rows, columns, planes, groups, whether signs are 0 and 1, rank of the low-rank part.
WEIGHTS = [
    (11, 192, 2, 1, False, 0),
    (9, 192, 2, 3, True, 0),
    (17, 70, 2, 1, False, 0),
    (16, 128, 1, 2, False, 4),
    (8, 64, 3, 2, False, 0),
]
LAUNCHES: list[tuple[int, Configuration]] = [
    (1, Gemv(1, 1)),
    (3, Gemv(2, 2, 2)),
    (5, Matmul(16, 16, 64, 4, 2)),
    (17, Matmul(16, 16, 64, 4, 2, 2)),
]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check; bfloat16 on a GPU only."""
    dtypes = [torch.float16, torch.float32] + ([torch.bfloat16] if device.startswith("cuda") else [])
    for number, (weight, launch) in enumerate(product(WEIGHTS, LAUNCHES)):
        # The dtypes differ in how x is read, which the checks of packed_gemm cover. Each check is compiled on a GPU.
        dtype = dtypes[number % len(dtypes)]
        yield f"{weight} {launch} {dtype}", partial(check, *weight, *launch, dtype, device)


def check(
    rows: int,
    columns: int,
    planes: int,
    groups: int,
    zero_one: bool,
    rank: int,
    n: int,
    chosen: Configuration,
    dtype: torch.dtype,
    device: str,
) -> None:
    """AssertionError where the kernel on device differs from the reference in float64 on the CPU."""
    generator = torch.Generator().manual_seed(columns + planes + n)
    positive = torch.randn(rows, planes, columns, generator=generator) > 0
    # Planes of different sizes, with scales of both signs, as DB-LLM's start.
    scale = torch.randn(rows, planes, groups, generator=generator) * torch.tensor([1.0, -0.3, 0.1])[:planes, None]
    left = torch.randn(rows, rank, generator=generator).to(dtype) if rank else None
    right = torch.randn(rank, columns, generator=generator).to(dtype) if rank else None
    weight = SignWeight(pack_signs(positive), scale.to(dtype), columns, zero_one, left, right)
    x = torch.randn(n, columns, generator=generator).to(dtype)
    with poisoned_outputs():
        found = triton_kernel.sign_gemm(x.to(device), moved(weight, device), chosen)
    assert_product(found, x, reference.dequantize(weight, torch.float64))


def compilations() -> list[Compilation]:
    """Two planes with one row and with 64 rows."""
    two_planes = {"MIDDLE": 0.5, "FACTOR": 2.0, "WRAP": True}
    return [
        of_gemv("one row", 1, 1, 2, 8, **two_planes),
        # On gfx942 a few scalar registers, which hold masks, spill.
        replace(of_matmul("64 rows", 1, Matmul(128, 64, 128, 8, 3), **two_planes), targets=CUDA),
    ]
