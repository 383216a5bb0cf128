"""Integer quantization of rows to 2, 3, 4 or 8 bits, packed into words, as a quantized cache stores keys and values.

Along "token", adjacent columns of a row share a scale (values); along "channel", adjacent rows of a column do (keys,
whose outliers lie in few channels). Words are laid out as in hasten.kernels.packed_weight: each row is a stream
of bits, so that a token's codes are adjacent in both cases.
"""

from torch import Tensor

from hasten.kernels.dispatch import use_triton
from hasten.kernels.packed_weight import BITS
from hasten.kernels.quantize_pack import reference
from hasten.kernels.quantize_pack.reference import AXES, Packed

__all__ = ["AXES", "Packed", "quantize_pack", "unpack_dequantize"]


def quantize_pack(x: Tensor, bits: int, axis: str, group_size: int | None = None, symmetric: bool = False) -> Packed:
    """x (R, C) as packed codes with a scale, and an offset unless symmetric, for each group.

    Scales and offsets are float16 for every dtype of x; numbers outside its finite range are cut to it. group_size:
    columns (axis="token") or rows (axis="channel") of a group; None: the whole row or column. Groups of columns are
    multiples of 32 or whole rows.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits} is not supported: use one of {', '.join(map(str, BITS))}")
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not supported: use one of {', '.join(AXES)}")
    length = x.shape[AXES[axis]]
    size = length if group_size is None else group_size
    if size < 1 or length % size:
        raise ValueError(
            f"group_size={group_size} must divide the {length} {'rows' if axis == 'channel' else 'columns'}"
        )
    if axis == "token" and size % 32 and size != length:
        raise ValueError(f"group_size={group_size} must be a multiple of 32 or the whole row of {length}")
    if use_triton(x):
        from hasten.kernels.quantize_pack import triton_kernel

        return triton_kernel.quantize_pack(x, bits, axis, size, symmetric)
    return reference.quantize_pack(x, bits, axis, size, symmetric)


def unpack_dequantize(packed: Packed) -> Tensor:
    """The values (R, C) that packed codes stand for, in the dtype of what was packed."""
    if use_triton(packed.words):
        from hasten.kernels.quantize_pack import triton_kernel

        return triton_kernel.unpack_dequantize(packed)
    return reference.unpack_dequantize(packed)
