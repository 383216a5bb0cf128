"""Quantization of values by their row's maximum, within Triton kernels. Imported by modules that need triton anyway."""

import triton
import triton.language as tl

from hasten.kernels.row_quantization import LEAST

_LEAST = tl.constexpr(LEAST)
# float32 numbers near it have a spacing of 1: adding it rounds to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(1.5 * 2**23)
# The same with a spacing of 2**-9, that of subnormal numbers of e4m3.
_E4M3_ROUNDER = tl.constexpr(1.5 * 2**14)


def warps_of(block: int) -> int:
    """Warps for a block of this many elements: up to 32 elements a thread, and no more than 16 warps."""
    return min(16, max(1, block // 1024))


@triton.jit
def round_to_even(x):  # type: ignore[no-untyped-def]
    """Nearest integers, float32, of magnitudes below 2**22."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def round_to_e4m3(x):  # type: ignore[no-untyped-def]
    """Nearest numbers of e4m3, float32, of magnitudes up to 448, ties to even.

    The conversion to the type is exact then. That of Triton's interpreter is wrong where it rounds up to a power of 2.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (x + _E4M3_ROUNDER) - _E4M3_ROUNDER
    return tl.where(tl.abs(x) < 2.0**-6, subnormal, normal)


@triton.jit
def limit_of(codes):  # type: ignore[no-untyped-def]
    """Largest magnitude of the codes that a pointer points to."""
    limit: tl.constexpr = 127.0 if codes.dtype.element_ty == tl.int8 else 448.0
    return limit


@triton.jit
def store_codes(codes, x, absmax, mask):  # type: ignore[no-untyped-def]
    """Store x, float32, as codes of the pointers' type. absmax: largest magnitude of the row."""
    limit = limit_of(codes)
    scaled = x * (limit / tl.maximum(absmax, _LEAST))
    scaled = tl.minimum(tl.maximum(scaled, -limit), limit)
    rounded = round_to_even(scaled) if codes.dtype.element_ty == tl.int8 else round_to_e4m3(scaled)
    tl.store(codes, rounded.to(codes.dtype.element_ty), mask=mask)


@triton.jit
def scale_of(codes, absmax):  # type: ignore[no-untyped-def]
    """Scale of a row with this largest magnitude."""
    return tl.maximum(absmax, _LEAST) / limit_of(codes)
