"""Benchmark cases of segmented_token, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.quantize_pack import quantize_pack
from hasten.kernels.segmented_token import DenseOperands, Operands, PackedOperands, c_kernel, prepare, reference
from hasten.kernels.timing import Case, Skipped
from hasten.kernels.timing import Operands as Tensors

# Query heads, key heads, size of a head: SmolLM2-135M, Llama 8B.
_HEADS = [(9, 3, 64), (32, 8, 128)]
_TOKENS, _BEHIND, _GROUP = 7424, 64, 32


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A case for each shape and kind of segment, HEADS/KV_HEADSxSIZE."""
    if not c_kernel.is_available(64):
        yield Skipped("segmented_token", "there is no C compiler")
        return
    for heads, kv_heads, size in _HEADS[:1] if dry else _HEADS:
        for bits in (None, 4, 2):
            tokens = 64 if dry else _TOKENS
            yield Case(
                op="segmented_token",
                shape=f"{heads}/{kv_heads}x{size}, {tokens} {'dense' if bits is None else f'{bits}-bit'} + {_BEHIND}",
                dtype="float32",
                device_type="cpu",
                operands=partial(_operands, heads, kv_heads, size, tokens),
                kernel=partial(_run, c_kernel.segmented_token, bits),
                reference=partial(_run, reference.segmented_token, bits),
                nbytes=2 * kv_heads * (tokens * (bits or 32) // 8 + _BEHIND * 4) * size,
                flops=4 * heads * (tokens + _BEHIND) * size,
                rtol=1e-3,
                atol=1e-4,
            )


def _operands(
    heads: int, kv_heads: int, size: int, tokens: int, generator: torch.Generator, device: torch.device
) -> Tensors:
    shapes = (heads + 2 * kv_heads, size), (size // 2, 2), *((kv_heads, count, size) for count in (tokens, _BEHIND) * 2)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


_PREPARED: dict[tuple[int, int | None], Any] = {}


def _run(
    kernel: Any,
    bits: int | None,
    qkv: Tensor,
    turns: Tensor,
    old_keys: Tensor,
    keys: Tensor,
    old_values: Tensor,
    values: Tensor,
) -> Tensor:
    key = old_keys.data_ptr(), bits
    if key not in _PREPARED:
        # Prepared once for each set of operands: the time of packing is not that of attention.
        segment: Operands = DenseOperands(list(old_keys), list(old_values))
        if bits is not None:
            width = min(old_keys.shape[2], 64)
            segment = PackedOperands(
                quantize_pack(old_keys.transpose(0, 1).flatten(1), bits, "channel", _GROUP),
                quantize_pack(old_values.transpose(0, 1).flatten(0, 1), bits, "token", width),
                len(keys),
            )
        _PREPARED[key] = prepare([segment])
    positions = torch.zeros(_BEHIND, dtype=torch.int32)
    place, size = _BEHIND - 1, keys.shape[2]
    output: Tensor = kernel(qkv, turns, size, keys, values, positions, 9, place, _PREPARED[key], size**-0.5, None)[0]
    return output
