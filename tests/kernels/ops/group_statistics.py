"""Statistics of groups of columns."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from hasten.kernels.group_statistics import reference, triton_kernel
from tests.kernels.ops.compilation import Compilation
from tests.kernels.poison import poisoned

# Rows, columns, group size.
SIZES = [(3, 96, 32), (5, 35, 7), (2, 2200, 1100), (1, 4, 1), (1, 9, 9)]
LONG_SIZES = [(129, 4096, 128), (7, 14_336, 14_336)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    for size in SIZES if device == "cpu" else SIZES + LONG_SIZES:
        for dtype in DTYPES:
            if device != "cpu" or dtype != torch.bfloat16:
                yield f"{size} {dtype}", partial(check, *size, dtype, device)


def compilations() -> list[Compilation]:
    """Groups of 128, and a single group: Triton makes constants of integers that are 1."""
    types = {"x": "*bf16", "out": "*fp32"} | dict.fromkeys(["count", "groups", "group_size", "stride"], "i32")
    types |= {"GROUPS": "constexpr", "COLUMNS": "constexpr"}
    single = types | {"count": "constexpr", "groups": "constexpr"}
    constants = {"count": 1, "groups": 1, "GROUPS": 1, "COLUMNS": 128}
    return [
        Compilation("bf16", triton_kernel.kernel, types, {"GROUPS": 16, "COLUMNS": 128}),
        Compilation("one group", triton_kernel.kernel, single, constants, targets=("sm_90",)),
    ]


def check(rows: int, columns: int, group_size: int, dtype: torch.dtype, device: str) -> None:
    """AssertionError where a statistic is not that of the reference in float64."""
    generator = torch.Generator().manual_seed(columns)
    x = (torch.randn(rows, columns + 3, generator=generator) - 0.5).to(dtype).to(device)[:, :columns]
    x[-1] = x[-1].abs() + 1  # a row without negative numbers
    with poisoned():
        found = triton_kernel.group_statistics(x, group_size)
    expected = reference.group_statistics(x.double(), group_size)
    for name in ("minimum", "maximum", "absmax"):
        assert torch.equal(getattr(found, name).double(), getattr(expected, name)), name
    # float32 sums in another order.
    torch.testing.assert_close(found.total.double(), expected.total, rtol=1e-5, atol=1e-5 * group_size**0.5)
    torch.testing.assert_close(found.squares.double(), expected.squares, rtol=1e-5, atol=0)
