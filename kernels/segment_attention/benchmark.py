"""Benchmark cases of segment_attention, a CPU kernel: it is timed on the CPU also with --device cuda."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.segment_attention import c_kernel, reference
from hasten.kernels.timing import Case, Operands, Skipped

# Query heads of a KV head, KV heads, size of a head: SmolLM2-135M, Llama 8B.
_HEADS = [(3, 3, 64), (4, 8, 128)]
_TOKENS = (64, 4096, 8192)


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """A case for each shape and number of tokens."""
    if not c_kernel.is_available(64):
        yield Skipped("segment_attention", "there is no C compiler")
        return
    for groups, heads, size in _HEADS[:1] if dry else _HEADS:
        for tokens in _TOKENS[:1] if dry else _TOKENS:
            yield Case(
                op="segment_attention",
                shape=f"{groups * heads}/{heads}x{size}, {tokens} tokens",
                dtype="float32",
                device_type="cpu",
                operands=partial(_operands, groups, heads, size, tokens),
                kernel=partial(_run, c_kernel.segment_attention),
                reference=partial(_run, reference.segment_attention),
                nbytes=2 * heads * tokens * size * 4,
                flops=4 * groups * heads * tokens * size,
                rtol=1e-3,
                atol=1e-4,
                peers={"torch sdpa": _sdpa},
            )


def _operands(
    groups: int, heads: int, size: int, tokens: int, generator: torch.Generator, device: torch.device
) -> Operands:
    queries = torch.randn(heads, groups, size, generator=generator)
    return queries, *(torch.randn(heads, tokens, size, generator=generator) for _ in range(2))


def _run(kernel, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    partial_result = kernel(queries, keys, values, 0.125, None, None, None)
    output: Tensor = partial_result.o / partial_result.l[..., None]
    return output


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, scale=0.125)
