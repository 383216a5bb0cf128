"""Benchmark cases of cache quantization: keys per channel and values per token, 8 heads of 128."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.quantize_pack import reference, triton_kernel
from hasten.kernels.quantize_pack.reference import GRID, Packed
from hasten.kernels.timing import Case, Operands

# Rows (heads times tokens), head size.
_SHAPES = [(8 * 128, 128), (8 * 32_768, 128)]
_DRY_SHAPES = [(32, 32)]
_GROUPS = {"channel": 32, "token": 32}


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """Packing for each shape, ROWSxCOLUMNS, axis and number of bits; and unpacking in 4 bits."""
    dtype = torch.float32 if dry else torch.bfloat16
    for rows, columns in _DRY_SHAPES if dry else _SHAPES:
        for axis, group_size in _GROUPS.items():
            for bits in (4,) if dry else (2, 4):
                elements = rows * columns
                packed = elements * bits // 8 + 2 * elements // group_size * GRID.itemsize
                case = partial(
                    Case,
                    op="quantize_pack",
                    dtype=str(dtype).removeprefix("torch."),
                    device_type=device.type,
                    nbytes=elements * dtype.itemsize + packed,
                    flops=4 * elements,
                )
                make = partial(_operands, rows, columns, dtype)
                name = f"{rows}x{columns} {bits} bits, groups of {group_size} a {axis}"
                yield case(
                    shape=name,
                    operands=make,
                    kernel=partial(_scale, triton_kernel.quantize_pack, bits, axis, group_size),
                    reference=partial(_scale, reference.quantize_pack, bits, axis, group_size),
                    rtol=2**-7,
                )
                if bits == 4:
                    packing = partial(_packed, make, bits, axis, group_size)
                    yield case(
                        shape=f"{name}, back",
                        operands=packing,
                        kernel=partial(_unpack, triton_kernel.unpack_dequantize, columns, bits, axis, dtype),
                        reference=partial(_unpack, reference.unpack_dequantize, columns, bits, axis, dtype),
                        rtol=2**-7,
                        atol=2**-7,
                    )


def _operands(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Operands:
    return (torch.randn(rows, columns, generator=generator, device=device).to(dtype),)


def _packed(
    make: Callable[..., Operands],
    bits: int,
    axis: str,
    group_size: int,
    generator: torch.Generator,
    device: torch.device,
) -> Operands:
    (x,) = make(generator, device)
    packed = triton_kernel.quantize_pack(x, bits, axis, group_size, False)
    assert packed.offset is not None
    return packed.words, packed.scale, packed.offset


def _scale(quantize: Callable[..., Packed], bits: int, axis: str, group_size: int, x: Tensor) -> Tensor:
    # Codes may differ by one where a quotient is in the middle between two.
    return quantize(x, bits, axis, group_size, False).scale


def _unpack(
    unpack: Callable[[Packed], Tensor],
    columns: int,
    bits: int,
    axis: str,
    dtype: torch.dtype,
    words: Tensor,
    scale: Tensor,
    offset: Tensor,
) -> Tensor:
    return unpack(Packed(words, scale, offset, columns, bits, axis, dtype))
