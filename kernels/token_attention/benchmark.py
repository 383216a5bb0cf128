"""Benchmark cases of token_attention, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Iterator
from functools import partial

import torch

from hasten.kernels.timing import Case, Operands, Skipped
from hasten.kernels.token_attention import c_kernel, reference

# Query heads, key heads, size of a head: SmolLM2-135M, Llama 8B.
_HEADS = [(9, 3, 64), (32, 8, 128)]
_LENGTHS = (128, 512, 4096)


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A case for each shape, HEADS/KV_HEADSxSIZE and positions in the cache."""
    if not c_kernel.is_available(64):
        yield Skipped("token_attention", "there is no C compiler")
        return
    for heads, kv_heads, size in _HEADS[:1] if dry else _HEADS:
        for length in _LENGTHS[:1] if dry else _LENGTHS:
            yield Case(
                op="token_attention",
                shape=f"{heads}/{kv_heads}x{size}, {length} positions",
                dtype="float32",
                device_type="cpu",
                operands=partial(_operands, heads, kv_heads, size, length),
                kernel=partial(_run, c_kernel.token_attention),
                reference=partial(_run, reference.token_attention),
                nbytes=2 * kv_heads * length * size * 4,
                flops=4 * heads * length * size,
                rtol=1e-4,
                atol=1e-5,
            )


def _operands(
    heads: int, kv_heads: int, size: int, length: int, generator: torch.Generator, device: torch.device
) -> Operands:
    qkv = torch.randn(heads + 2 * kv_heads, size, generator=generator)
    turns = torch.randn(size // 2, 2, generator=generator)
    return qkv, turns, torch.randn(2 * kv_heads, length, size, generator=generator)


def _run(kernel, qkv: torch.Tensor, turns: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    # The rotation is in place, so that repeated calls would rotate again.
    result: torch.Tensor = kernel(qkv.clone(), turns, cache, cache.shape[1] - 1, 0, 0.125, None)
    return result
