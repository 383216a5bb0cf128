"""Benchmark cases of rotary embedding and cache writes: heads of 8B and 70B models, both conventions."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hasten.kernels.rotary_append import reference, triton_kernel
from hasten.kernels.timing import Case, Operands

# Tokens, query heads, KV heads, head size.
_SHAPES = [(1, 32, 8, 128), (64, 32, 8, 128), (64, 64, 8, 128), (4096, 32, 8, 128)]
_DRY_SHAPES = [(2, 4, 1, 16)]
_POSITIONS = 4096


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each shape, TOKENSxHEADS+2xKV_HEADSxSIZE, and convention."""
    dtype = torch.float32 if dry else torch.bfloat16
    for tokens, heads, kv_heads, size in _DRY_SHAPES if dry else _SHAPES:
        for interleaved in (True, False):
            elements = tokens * (heads + 2 * kv_heads) * size
            yield Case(
                op="rotary_append",
                shape=f"{tokens}x{heads}+2x{kv_heads}x{size} {'interleaved' if interleaved else 'halves'}",
                dtype=str(dtype).removeprefix("torch."),
                device_type=device.type,
                operands=partial(_operands, tokens, heads, kv_heads, size, dtype),
                kernel=partial(_run, triton_kernel.rotary_append, interleaved),
                reference=partial(_run, reference.rotary_append, interleaved),
                nbytes=2 * elements * dtype.itemsize,
                flops=3 * elements,
                rtol=2**-7,
                atol=1e-2,
            )


def _operands(
    tokens: int,
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> Operands:
    qkv = torch.randn(tokens, heads + 2 * kv_heads, size, generator=generator, device=device).to(dtype)
    angles = 10 * torch.rand(_POSITIONS, size // 2, generator=generator, device=device)
    places = torch.arange(tokens, device=device)
    cache = torch.empty(1, 2 * kv_heads, tokens, size, dtype=dtype, device=device)
    return qkv, torch.stack([angles.cos(), angles.sin()], -1), cache, torch.zeros_like(places), places


def _run(
    function: Callable[..., Tensor],
    interleaved: bool,
    qkv: Tensor,
    cis: Tensor,
    cache: Tensor,
    slots: Tensor,
    places: Tensor,
) -> Tensor:
    return function(qkv, cis, places % _POSITIONS, cache, slots, places, interleaved)
