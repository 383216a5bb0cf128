"""Benchmark cases of products with packed weights: shapes of 8B and 70B models, one row to a prompt.

On a GPU the launch configurations are measured first, as `hasten.kernels.packed_gemm.triton_kernel.tune` does.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.packed_gemm import reference, triton_kernel
from hasten.kernels.packed_weight import PackedWeight, pack_codes
from hasten.kernels.timing import Case, Operands

_GROUP = 128
# Bits, rows of x, rows and columns of the weight.
_SHAPES = [
    # Few cases: for each width and number of rows, five to ten configurations are compiled and measured.
    *((4, n, *shape) for shape in ((14336, 4096), (4096, 4096), (8192, 28672)) for n in (1, 16, 64)),
    *((4, n, 14336, 4096) for n in (4, 512)),
    *((bits, 1, 14336, 4096) for bits in (2, 3, 8)),
]
_DRY_SHAPES = [(4, 1, 16, 256), (3, 20, 32, 128)]
_INNER_K_TILES = 8


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each shape, BITSbits ROWSxCOLUMNS/GROUP_SIZE, with asymmetric groups."""
    dtype = torch.float16 if dry else torch.bfloat16  # the interpreter computes wrongly with bfloat16
    for bits, n, rows, columns in _DRY_SHAPES if dry else _SHAPES:
        groups = columns // _GROUP
        yield Case(
            op="packed_gemm",
            shape=f"{n}x{columns} {bits} bits {rows}x{columns}/{_GROUP}",
            dtype=str(dtype).removeprefix("torch."),
            device_type=device.type,
            operands=partial(_operands, bits, n, rows, columns, dtype),
            kernel=partial(_kernel, bits, columns),
            reference=partial(_reference, bits, columns),
            nbytes=rows * (columns * bits // 8 + groups * (dtype.itemsize + 1)) + n * (columns + rows) * dtype.itemsize,
            flops=2 * n * rows * columns,
            # Outputs have a standard deviation of one; weights are rounded to the dtype of x.
            rtol=2**-7,
            atol=2**-5,
            peers={"torch.mm of dequantized": _mm} | ({"torch._weight_int4pack_mm": _int4pack_mm} if bits == 4 else {}),
            prepare=partial(_tune, bits, columns),
        )


def _operands(
    bits: int, n: int, rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    """x, codes, scale and zero point; the dense weight; the weight as torch packs 4 bits, with its scales."""
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, device=device)
    groups = columns // _GROUP
    scale = torch.rand(rows, groups, generator=generator, device=device) + 0.5
    scale = (scale / (columns**0.5 * 2 ** (bits - 2))).to(dtype)
    zero_point = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8, device=device)
    x = torch.randn(n, columns, generator=generator, device=device).to(dtype)
    wide = scale.float().repeat_interleave(_GROUP, 1)
    dense = ((codes - zero_point.repeat_interleave(_GROUP, 1).int()) * wide).to(dtype)
    packed, scales = torch.empty(0, device=device), torch.empty(0, device=device)
    # Not every torch or GPU packs; the peer then fails and is reported.
    with suppress(Exception):
        if bits == 4:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs, _INNER_K_TILES)
            scales = torch.stack([scale, (8 - zero_point.to(dtype)) * scale], -1).transpose(0, 1).contiguous()
    return x, pack_codes(codes, bits), scale, zero_point, dense, packed, scales


def _weight(bits: int, columns: int, codes: Tensor, scale: Tensor, zero_point: Tensor, *_: Tensor) -> PackedWeight:
    return PackedWeight(codes, scale, columns, bits, zero_point)


def _tune(bits: int, columns: int, x: Tensor, *parts: Tensor) -> None:
    triton_kernel.tune(x, _weight(bits, columns, *parts))


def _kernel(bits: int, columns: int, x: Tensor, *parts: Tensor) -> Tensor:
    return triton_kernel.packed_gemm(x, _weight(bits, columns, *parts))


def _reference(bits: int, columns: int, x: Tensor, *parts: Tensor) -> Tensor:
    return reference.packed_gemm(x, _weight(bits, columns, *parts))


def _mm(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, dense: Tensor, *_: Tensor) -> Tensor:
    return x @ dense.T


def _int4pack_mm(x: Tensor, *parts: Tensor) -> Tensor:
    packed, scales = parts[-2:]
    return torch._weight_int4pack_mm(x, packed, _GROUP, scales)
