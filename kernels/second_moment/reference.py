"""The layout of the sums, and the sums by torch's matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def panel_bounds(columns: int, width: int) -> list[tuple[int, int]]:
    """First row and end row of every panel."""
    return [(start, min(columns, start + width)) for start in range(0, columns, width)]


def panels(sums: Tensor, columns: int, width: int) -> list[Tensor]:
    """The panels: rows start … stop - 1 with the columns before stop, (stop - start, stop)."""
    bounds = panel_bounds(columns, width)
    parts = sums.split([(stop - start) * stop for start, stop in bounds])
    return [part.view(stop - start, stop) for (start, stop), part in zip(bounds, parts, strict=True)]


def add(sums: Tensor, x: Tensor, width: int) -> None:
    """See hasten.kernels.second_moment.add."""
    columns = x.shape[1]
    is_bfloat16, x = x.dtype == torch.bfloat16, x.float()
    with _bfloat16_products(is_bfloat16):
        for (start, stop), panel in zip(panel_bounds(columns, width), panels(sums, columns, width), strict=True):
            panel.addmm_(x[:, start:stop].T, x[:, :stop])


@contextmanager
def _bfloat16_products(allowed: bool) -> Iterator[None]:
    """Let products of float32 matrices run on bfloat16 units; exact where both matrices hold bfloat16 values.

    Sums stay float32. Has no effect on CPUs without matrix units (AMX), and where allowed is False.
    """
    if not allowed:
        yield
        return
    cpu, gpu = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, gpu.fp32_precision
    # A GPU's tf32 keeps more of the mantissa than bfloat16 has.
    cpu.fp32_precision, gpu.fp32_precision = "bf16", "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before


def spread(panel: Tensor, start: int, place: Tensor, tokens: int, out: Tensor) -> None:
    """See hasten.kernels.second_moment.spread."""
    stop = panel.shape[1]
    rows, columns = place[start:stop], place[:stop]
    mean = panel / tokens
    out[rows[:, None], columns[None, :]] = mean
    out[columns[:, None], rows[None, :]] = mean.T
