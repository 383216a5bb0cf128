"""Sum of x xᵀ over tokens in panels."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from hasten.kernels.second_moment import panel_bounds, panels, triton_kernel
from tests.kernels.ops.compilation import Compilation

# Tokens, columns, width of a panel, rows and columns of a tile.
SIZES = [(5, 16, 16, (16, 16)), (33, 70, 32, (32, 16)), (40, 50, 48, (16, 32))]
LONG_SIZES = [(513, 300, 128, None), (2048, 2304, 256, None)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    for size in SIZES if device == "cpu" else SIZES + LONG_SIZES:
        for dtype in DTYPES:
            yield f"{size} {dtype}", partial(check, *size, dtype, device)


def compilations() -> list[Compilation]:
    """bfloat16 on tensor cores, in the larger tile; float32."""
    types = {"x": "*bf16", "sums": "*fp32"} | dict.fromkeys(["tokens", "columns", "width", "x_stride"], "i32")
    types |= dict.fromkeys(["ROWS", "COLUMNS", "TOKENS"], "constexpr")
    kernel, aligned = triton_kernel.kernel, ("columns", "x_stride")
    large, small = ({"ROWS": rows, "COLUMNS": 64, "TOKENS": 32} for rows in (128, 64))
    options = {"num_warps": 8, "num_stages": 3}
    wide, fewer = types | {"x": "*fp32"}, {"num_warps": 4, "num_stages": 3}
    return [
        Compilation("bf16", kernel, types, large, options, tensor_cores=True, aligned=aligned),
        Compilation("fp32", kernel, wide, small, fewer, targets=("sm_90", "gfx942"), aligned=aligned),
    ]


def check(tokens: int, columns: int, width: int, tile: tuple[int, int] | None, dtype: torch.dtype, device: str) -> None:
    """AssertionError where the sums, or what they are added to, are wrong, or do not repeat to the bit."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns + 3, generator=generator).to(dtype).to(device)[:, :columns]
    size = sum((stop - start) * stop for start, stop in panel_bounds(columns, width))
    before = torch.randn(size, generator=generator).to(device)
    sums, again = before.clone(), before.clone()
    triton_kernel.add(sums, x, width, tile)
    triton_kernel.add(again, x, width, tile)
    assert torch.equal(sums, again)
    exact = x.double().T @ x.double()
    bounds = panel_bounds(columns, width)
    parts = zip(bounds, panels(sums, columns, width), panels(before, columns, width), strict=True)
    for (start, stop), panel, old in parts:
        # Rounding of float32 sums over the tokens.
        torch.testing.assert_close(
            panel.double() - old.double(), exact[start:stop, :stop], rtol=1e-5, atol=1e-6 * tokens**0.5 + 1e-6
        )
