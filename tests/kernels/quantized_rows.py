"""What codes per row must satisfy."""

import torch
from torch import Tensor

from hasten.kernels.row_quantization import LEAST, LIMITS


def check_codes(codes: Tensor, scale: Tensor, exact: Tensor) -> None:
    """AssertionError if codes * scale is not exact (..., C) float64 within the codes' own rounding."""
    limit = LIMITS[codes.dtype]
    codes, scale, exact = codes.float().double(), scale.double(), exact.double()
    # float32 sums of the rows, in another order.
    torch.testing.assert_close(scale, exact.abs().amax(-1, keepdim=True).clamp(min=LEAST) / limit, rtol=1e-5, atol=0)
    error = (codes * scale - exact).abs()
    if limit == LIMITS[torch.int8]:
        assert bool((error <= 0.501 * scale).all())
        return
    # e4m3 keeps 4 bits of the mantissa and has a smallest step of 2**-9.
    step = torch.maximum(exact.abs() / 8, scale / 512)
    assert bool((error <= 0.501 * step).all())
