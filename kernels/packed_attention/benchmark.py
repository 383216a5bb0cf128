"""Benchmark cases of packed_attention, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.packed_attention import c_kernel, reference
from hasten.kernels.quantize_pack import Packed, quantize_pack
from hasten.kernels.timing import Case, Operands, Skipped

# Query heads of a KV head, KV heads, size of a head: SmolLM2-135M, Llama 8B.
_HEADS = [(3, 3, 64), (4, 8, 128)]
_TOKENS, _GROUP = (1024, 8192), 32
# Packing is interpreted in a dry run, which for 1024 tokens takes longer than all other cases together.
_DRY_TOKENS = (64,)


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A case for each width, shape and number of tokens; the peer attends to the dense cache."""
    if not c_kernel.is_available(4, 64):
        yield Skipped("packed_attention", "there is no C compiler")
        return
    for groups, heads, size in _HEADS[:1] if dry else _HEADS:
        for tokens in _DRY_TOKENS if dry else _TOKENS:
            for bits in (4,) if dry else (2, 4, 8):
                yield Case(
                    op="packed_attention",
                    shape=f"{groups * heads}/{heads}x{size}, {tokens} tokens, {bits} bits",
                    dtype="float32",
                    device_type="cpu",
                    operands=partial(_operands, groups, heads, size, tokens),
                    kernel=partial(_run, c_kernel.packed_attention, bits),
                    reference=partial(_run, reference.packed_attention, bits),
                    nbytes=2 * heads * tokens * size * bits // 8,
                    flops=4 * groups * heads * tokens * size,
                    rtol=1e-3,
                    atol=1e-4,
                    peers={"torch sdpa, dense": _dense},
                )


def _operands(
    groups: int, heads: int, size: int, tokens: int, generator: torch.Generator, device: torch.device
) -> Operands:
    """Queries, dense keys and values, and the tensors of both packed, which `_run` puts together again."""
    queries = torch.randn(heads, groups, size, generator=generator) * size**-0.5
    return queries, *(torch.randn(heads, tokens, size, generator=generator) for _ in range(2))


def _packed(keys: Tensor, values: Tensor, bits: int) -> tuple[Packed, Packed]:
    # Packed once for each set of operands: the time of packing is not that of attention.
    key = (keys.data_ptr(), bits)
    if key not in _CACHE:
        width = min(keys.shape[2], 64)
        _CACHE[key] = (
            quantize_pack(keys.transpose(0, 1).flatten(1), bits, "channel", _GROUP),
            quantize_pack(values.transpose(0, 1).flatten(0, 1), bits, "token", width),
        )
    return _CACHE[key]


_CACHE: dict[tuple[int, int], tuple[Packed, Packed]] = {}


def _run(kernel, bits: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    partial_result = kernel(queries, *_packed(keys, values, bits), 1.0, None)
    output: Tensor = partial_result.o / partial_result.l[..., None]
    return output


def _dense(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
