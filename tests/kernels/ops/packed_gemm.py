"""Products with packed weights: kernels without and with tensor cores, and the sum over splits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import triton.language as tl
from torch import Tensor

from hasten.kernels.packed_gemm import reference, triton_gemv, triton_kernel, triton_matmul
from hasten.kernels.packed_gemm.choice import Configuration, Gemv, Matmul
from hasten.kernels.packed_weight import PackedWeight, pack_codes
from tests.kernels.ops.compilation import Compilation


@dataclass(frozen=True)
class Variant:
    """One product. groups: scales of a row. order: groups are permuted. strided: x is a slice of columns."""

    n: int
    rows: int
    columns: int
    bits: int
    groups: int
    configuration: Configuration | None = None
    symmetric: bool = False
    order: bool = False
    strided: bool = False


_GEMV, _SPLIT_GEMV = Gemv(1, 1), Gemv(2, 2, 2)
_MATMUL, _SPLIT_MATMUL = Matmul(16, 16, 64, 4, 2), Matmul(32, 16, 32, 4, 2, 2)
# Sizes that are no multiples of a tile, groups shorter than the units of a thread and shorter than a unit.
VARIANTS = [
    Variant(1, 11, 256, 4, 8, _GEMV),
    Variant(3, 9, 200, 4, 5, _SPLIT_GEMV, strided=True),
    Variant(2, 8, 96, 3, 3, _GEMV, symmetric=True),
    Variant(1, 5, 70, 3, 1, _SPLIT_GEMV),
    Variant(2, 8, 256, 2, 16, _GEMV),
    Variant(1, 8, 256, 2, 4, _GEMV, symmetric=True),
    Variant(1, 9, 128, 8, 4, _SPLIT_GEMV),
    Variant(2, 8, 128, 8, 1, _GEMV, symmetric=True),
    Variant(1, 7, 60, 4, 5, _GEMV),
    Variant(2, 8, 64, 4, 4, _GEMV, order=True),
    Variant(5, 18, 200, 4, 5, _MATMUL, strided=True),
    Variant(17, 16, 96, 3, 3, _SPLIT_MATMUL),
    Variant(16, 9, 70, 3, 1, _MATMUL, symmetric=True),
    Variant(16, 16, 128, 2, 8, _SPLIT_MATMUL),
    Variant(16, 16, 96, 8, 3, _MATMUL),
    Variant(16, 16, 60, 4, 5, _MATMUL, symmetric=True),
    Variant(16, 16, 64, 4, 4, _MATMUL, order=True),
    Variant(1, 24, 128, 4, 2),
    Variant(20, 24, 128, 4, 2),
]
# In units of the last place of the output: one for its rounding, the rest for sums in float32.
_ROUNDING = {torch.float32: 2**-19, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check; bfloat16 on a GPU only."""
    dtypes = [torch.float16, torch.float32] + ([torch.bfloat16] if device.startswith("cuda") else [])
    for variant, dtype in product(VARIANTS, dtypes):
        yield f"{variant} {dtype}", partial(check, variant, dtype, device)
    if device.startswith("cuda"):
        for bits, n in ((4, 1), (3, 4), (2, 64), (8, 130)):
            yield f"large {bits} {n}", partial(check, Variant(n, 4096, 4096, bits, 32), torch.bfloat16, device)


def inputs(variant: Variant, dtype: torch.dtype) -> tuple[Tensor, PackedWeight]:
    """x (N, C) and a weight with scales in dtype, seeded by the variant, on the CPU."""
    generator = torch.Generator().manual_seed(variant.columns + variant.bits)
    shape = (variant.rows, variant.columns)
    codes = torch.randint(0, 2**variant.bits, shape, generator=generator)
    scale = (torch.rand(variant.rows, variant.groups, generator=generator) + 0.01).to(dtype)
    zero_point = torch.randint(0, 2**variant.bits, scale.shape, generator=generator, dtype=torch.uint8)
    index = None
    if variant.order:
        group = torch.arange(variant.groups).repeat_interleave(variant.columns // variant.groups)
        index = group[torch.randperm(variant.columns, generator=generator)].int()
    weight = PackedWeight(
        pack_codes(codes, variant.bits),
        scale,
        variant.columns,
        variant.bits,
        None if variant.symmetric else zero_point,
        index,
    )
    x = torch.randn(variant.n, variant.columns + 3, generator=generator).to(dtype)
    return (x[:, 2:-1] if variant.strided else x[:, : variant.columns].contiguous()), weight


def check(variant: Variant, dtype: torch.dtype, device: str) -> None:
    """AssertionError where the kernel on device differs from the reference in float64 on the CPU."""
    x, weight = inputs(variant, dtype)
    x_device = x.to(device)
    if variant.strided:
        x_device = torch.nn.functional.pad(x_device, (1, 1))[:, 1:-1]
    with poisoned_outputs():
        found = triton_kernel.packed_gemm(x_device, moved(weight, device), variant.configuration)
    assert_product(found, x, reference.dequantize(weight, torch.float64))


def moved(weight: Any, device: str) -> Any:
    """A dataclass with its tensors on device."""
    tensors = {name: value.to(device) for name, value in vars(weight).items() if isinstance(value, Tensor)}
    return replace(weight, **tensors)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """New tensors hold NaN, so that an element that is not written is wrong."""
    empty = torch.empty
    with patch("torch.empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan)):
        yield


def assert_product(found: Tensor, x: Tensor, dense: Tensor) -> None:
    """found equals the product of x and the weight dense float64, within the rounding of x's dtype."""
    exact = x.double() @ dense.T
    # Terms of a sum cancel: its rounding errors are relative to the sum of magnitudes.
    magnitude = x.double().abs() @ dense.abs().T
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    error = (found.cpu().double() - exact).abs() / magnitude
    assert bool((error <= _ROUNDING[x.dtype]).all()), f"error {float(error.max())} of the sum of magnitudes"


CUDA = ("sm_80", "sm_90", "sm_100")
_POINTERS = {"codes": "*i32", "scale": "*bf16", "zero_point": "*u8", "group_index": "*i32", "alpha": "*fp32"}
_POINTERS |= {"out": "*bf16"}
_SHARED = {"ROW_GROUP": 1, "FLOAT": False, "SCALE": "float", "FACTOR": 1.0, "ALPHA": False, "WRAP": False}
_SHARED |= {"SYMMETRIC": True, "GATHER": False, "INDEXED": False}


def of_gemv(name: str, bits: int, x_rows: int, rows_of_thread: int, warps: int, **constants: object) -> Compilation:
    """Launch of the kernel without tensor cores, groups of 128, in bfloat16."""
    names = "x codes scale zero_point group_index alpha out n rows columns units x_units words groups units_of_split"
    unit = triton_gemv.unit_codes(bits)
    own = {"GROUP": 128 // unit, "BITS": bits, "MIDDLE": 2.0 ** (bits - 1), "NR": x_rows, "RT": rows_of_thread}
    own |= {"KW": warps, "V": 1 if unit == 32 else 4, "ONE_SCALE": True, "EVEN": True, "DTYPE": tl.bfloat16}
    return _compilation(name, triton_gemv.kernel, names, "*i64", own | constants, {"num_warps": warps}, False)


def of_matmul(name: str, bits: int, chosen: Matmul, **constants: object) -> Compilation:
    """Launch of the kernel on tensor cores, groups of 128, in bfloat16."""
    names = "x codes scale zero_point group_index alpha out n rows columns x_stride units x_units words groups"
    unit = triton_gemv.unit_codes(bits)
    own = {"GROUP": 128 // unit, "BITS": bits, "MIDDLE": 2.0 ** (bits - 1), "BLOCK_R": chosen.block_r}
    own |= {"BLOCK_N": chosen.block_n, "BLOCK_U": chosen.block_k // unit}
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    names += " units_of_split"
    return _compilation(name, triton_matmul.kernel, names, "*bf16", own | constants, options, True)


def _compilation(
    name: str, kernel: Any, names: str, x: str, own: dict[str, Any], options: dict[str, int], tensor_cores: bool
) -> Compilation:
    constants = _SHARED | own
    types = {key: _POINTERS.get(key, x if key == "x" else "i32") for key in names.split()}
    if constants["SCALE"] != "float":
        types["scale"] = "*u8"
    # In the order of the kernel's arguments.
    types |= {key: "constexpr" for key in kernel.arg_names if key in constants}
    return Compilation(name, kernel, types, constants, options, tensor_cores)


def compilations() -> list[Compilation]:
    """One row and four rows at 4 bits, other widths, act-order; tiles of 16, 64 and 128 rows."""
    return [
        # A thread block of 16 AMD warps has no more than 128 registers a thread.
        replace(of_gemv("one row, 4 bits", 4, 1, 4, 16), targets=CUDA),
        replace(of_gemv("one row, 4 bits, 8 warps", 4, 1, 4, 8), targets=("gfx942",)),
        of_gemv("four rows, 4 bits, asymmetric", 4, 4, 2, 8, SYMMETRIC=False, EVEN=False),
        of_gemv("one row, 3 bits", 3, 1, 4, 8),
        of_gemv("one row, 2 bits", 2, 1, 2, 8),
        of_gemv("one row, 8 bits, act-order", 8, 1, 2, 8, GATHER=True, INDEXED=True),
        of_matmul("16 rows, 4 bits", 4, Matmul(128, 16, 128, 4, 3)),
        of_matmul("64 rows, 4 bits", 4, Matmul(128, 64, 128, 8, 3), SYMMETRIC=False),
        of_matmul("128 rows, 4 bits", 4, Matmul(128, 128, 64, 8, 3)),
        # On gfx942 two scalar registers, which hold masks, spill.
        replace(of_matmul("64 rows, 3 bits", 3, Matmul(128, 64, 128, 8, 3)), targets=CUDA),
    ]
