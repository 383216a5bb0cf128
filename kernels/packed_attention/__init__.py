"""Attention over packed keys and values on a CPU: codes are read as they are stored, which is what a small cache saves.

Keys are quantized by channel over groups of tokens, values by token, see kernels/quantize_pack. The result is a partial
one, see kernels/attention/contract.py.
"""

from torch import Tensor

from hasten.kernels.attention.contract import Partial
from hasten.kernels.packed_attention import c_kernel, reference
from hasten.kernels.quantize_pack import Packed


def is_faster(keys: Packed, heads: int) -> bool:
    """Whether there is a compiled kernel for keys like these, of so many KV heads."""
    on_cpu = keys.words.device.type == "cpu" and keys.offset is not None
    return on_cpu and c_kernel.is_available(keys.bits, keys.columns // heads)


def packed_attention(
    queries: Tensor, keys: Packed, values: Packed, scale: float = 1.0, cap: float | None = None
) -> Partial:
    """Partial result o (H, N, D), m and l (H, N), of queries (H, N, D) float32.

    keys: codes of (T, H * D) by channel. values: codes of (T * H, D) by token. scale: of scores. cap: of a soft cap,
    None for none.
    """
    kernel = c_kernel if is_faster(keys, len(queries)) else reference
    return kernel.packed_attention(queries, keys, values, scale, cap)
