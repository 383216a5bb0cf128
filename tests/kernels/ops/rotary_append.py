"""Rotary embedding and writing into the cache."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from hasten.kernels.rotary_append import reference, triton_kernel
from tests.kernels.ops.compilation import Compilation
from tests.kernels.poison import poisoned


@dataclass(frozen=True)
class Setting:
    """Numbers of query and KV heads, head size, rotated dimensions, convention, norms of heads, pages."""

    heads: int
    kv_heads: int
    size: int
    rotated: int
    interleaved: bool
    norms: bool = False
    paged: bool = False


SETTINGS = [
    Setting(6, 2, 16, 16, True),
    Setting(3, 1, 20, 20, False, norms=True),
    Setting(3, 1, 20, 8, False, paged=True),
    Setting(7, 1, 12, 4, True, norms=True, paged=True),
]
LARGE = [Setting(32, 8, 128, 128, True), Setting(64, 8, 128, 64, False, norms=True, paged=True)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS, SLOTS, CAPACITY, POSITIONS = 4, 3, 8, 30


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    for setting in SETTINGS if device == "cpu" else SETTINGS + LARGE:
        for dtype in DTYPES:
            if device != "cpu" or dtype != torch.bfloat16:
                yield f"{setting} {dtype}", partial(check, setting, dtype, device)


def compilations() -> list[Compilation]:
    """The fast path's convention, and the other one with norms and pages."""
    names = ["heads", "both", "first_value", "capacity", "row_stride", "slot_stride", "head_stride", "place_stride"]
    types = {"qkv": "*bf16", "cis": "*fp32", "rotations": "*i64", "cache": "*bf16", "slots": "*i64", "places": "*i64"}
    types |= {"query_norm": "constexpr", "key_norm": "constexpr", "block_table": "constexpr", "queries": "*bf16"}
    types |= dict.fromkeys([*names, "table_stride"], "i32") | {"eps": "fp32"}
    types |= dict.fromkeys(["SIZE", "ROTATED", "INTERLEAVED", "HEADS", "PAIRS"], "constexpr")
    constants = {"SIZE": 128, "ROTATED": 128, "INTERLEAVED": True, "HEADS": 8, "PAIRS": 64}
    absent = {"query_norm": None, "key_norm": None, "block_table": None}
    full = types | {"query_norm": "*bf16", "key_norm": "*bf16", "block_table": "*i32"}
    return [
        Compilation("interleaved", triton_kernel.kernel, types, constants | absent, targets=("sm_90", "gfx942")),
        Compilation("norms", triton_kernel.kernel, full, constants | {"INTERLEAVED": False, "ROTATED": 64}),
    ]


def check(setting: Setting, dtype: torch.dtype, device: str) -> None:
    """AssertionError where queries or the cache differ from the reference's in float64."""
    generator = torch.Generator().manual_seed(setting.size)
    both = setting.heads + 2 * setting.kv_heads
    qkv = torch.randn(TOKENS, both + 1, setting.size, generator=generator).to(dtype).to(device)[:, :both]
    angles = 10 * torch.rand(POSITIONS, setting.rotated // 2, generator=generator).to(device)
    cis = torch.stack([angles.cos(), angles.sin()], -1)
    rotations = torch.randint(0, POSITIONS, (TOKENS,), generator=generator).to(device)
    # The third token is padding; two tokens share a slot.
    slots = torch.tensor([2, 0, -1, 2], device=device)
    places = torch.tensor([CAPACITY - 1, 5, 3, 0], device=device)
    table, shape = None, (SLOTS, 2 * setting.kv_heads, CAPACITY, setting.size)
    if setting.paged:
        pages = torch.randperm(SLOTS * 2, generator=generator).view(SLOTS, 2).int()
        table = torch.stack([pages, 0 * pages], 2).to(device)[..., 0]
        shape = (SLOTS * 2, 2 * setting.kv_heads, CAPACITY // 2, setting.size)
    cache = torch.randn(shape, generator=generator).to(dtype).to(device)
    norms = [None, None]
    if setting.norms:
        norms = list(torch.rand(2, setting.size, generator=generator).to(dtype).to(device))
    expected_cache, found_cache = cache.double(), cache.clone()
    exact_norms = [None if norm is None else norm.double() for norm in norms]
    options = (slots, places, setting.interleaved)
    expected = reference.rotary_append(
        qkv.double(), cis, rotations, expected_cache, *options, *exact_norms, 1e-6, table
    )
    # Elements of arguments need not be adjacent.
    rotations, slots, places = (torch.stack([each, 0 * each], 1)[:, 0] for each in (rotations, slots, places))
    norms = [None if norm is None else torch.stack([norm, -norm], 1)[:, 0] for norm in norms]
    with poisoned():
        found = triton_kernel.rotary_append(
            qkv, cis, rotations, found_cache, slots, places, setting.interleaved, *norms, 1e-6, table
        )
    # One rounding to the dtype; a rotation subtracts numbers of up to about 3.
    tolerance = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(found_cache.double(), expected_cache, rtol=tolerance, atol=1e-6)
    # What belongs to no token is untouched to the bit.
    changed = (found_cache != cache).any(-1).any(1)
    assert int(changed.sum()) == 3
