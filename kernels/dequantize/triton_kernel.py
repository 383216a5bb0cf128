"""Triton kernel of kernels/dequantize.py; apart from it because importing triton costs seconds."""

import triton
import triton.language as tl


@triton.jit
def kernel(codes, scale, zero_point, out, columns, groups, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program: BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    group = row * groups + column // size
    code = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.float32)
    step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zero_point + group, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * columns + column, ((code - zero) * step).to(out.dtype.element_ty), mask=inside)
