"""Dequantization of unpacked codes."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from hasten.kernels.dequantize import reference, triton_kernel
from tests.kernels.ops.compilation import Compilation

# Rows, columns, groups: one element a group, sizes that are no powers of two, rows longer than a block.
SIZES = [(1, 8, 1), (3, 96, 3), (5, 1056, 11), (2, 2048, 1), (4, 7, 7), (129, 576, 9)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "sliced"]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    for size, dtype, layout in product(SIZES, DTYPES, LAYOUTS):
        yield f"{size} {dtype} {layout}", partial(check, size, dtype, layout, device)


def compilations() -> list[Compilation]:
    """One launch for each dtype of the weight."""
    types = {"codes": "*u8", "scale": "", "zero_point": "*u8", "out": "", "columns": "i32", "groups": "i32"}
    types |= {"group_size": "i32", "BLOCK": "constexpr"}
    return [
        Compilation(dtype, triton_kernel.kernel, types | {"scale": f"*{dtype}", "out": f"*{dtype}"}, {"BLOCK": 1024})
        for dtype in ("fp32", "bf16", "fp16")
    ]


def inputs(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (R, C), scale (R, G) in dtype and zero point (R, G), seeded by the size, on the CPU."""
    rows, columns, groups = size
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.01).to(dtype)
    zero_point = torch.randint(0, 256, (rows, groups), generator=generator, dtype=torch.uint8)
    return codes, scale, zero_point


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "sliced":
        padded = torch.cat([tensor, torch.zeros_like(tensor)], dim=1)
        return padded[:, : tensor.shape[1]]
    return tensor


def check(size: tuple[int, int, int], dtype: torch.dtype, layout: str, device: str) -> None:
    """AssertionError where the kernel on device differs from the reference on the CPU."""
    tensors = inputs(size, dtype)
    found = triton_kernel.dequantize(*(laid_out(tensor.to(device), layout) for tensor in tensors)).cpu()
    # Triton's interpreter truncates float32 to bfloat16 where hardware rounds: one unit in the last of 8 bits.
    tolerance = 2**-7 if dtype == torch.bfloat16 and device == "cpu" else 0.0
    torch.testing.assert_close(found, reference.dequantize(*tensors), rtol=tolerance, atol=0)
