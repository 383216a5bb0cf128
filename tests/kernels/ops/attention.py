"""Attention: partial results by stream-K, and their merge."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.attention import (
    Cache,
    Partial,
    Scoring,
    Tree,
    launch,
    merge_kernel,
    reference,
    shared_prefix_attention,
    triton_kernel,
)
from hasten.kernels.attention.contract import PLAIN
from hasten.kernels.attention.launch import Config
from tests.kernels.ops.compilation import TARGETS, Compilation

# Error of an output whose values are standard normal numbers: of sums in float32 in different orders, with weights
# whose exponentials have 2e-7 of relative error times scores of up to 10; else of weights and outputs that are rounded.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GPUS = {"sm_90": ("sm_90",), "cuda": ("sm_80", "sm_100"), "hip": ("gfx942",)}
SMALL = Config(16, 16, 4, 2, 1)


@dataclass(frozen=True)
class Shape:
    """lengths: of the prefixes. nodes: of the trees; empty for none. counts: queries of each tree; None is all nodes.

    page: tokens of a page; 0 for a contiguous cache.
    """

    lengths: tuple[int, ...]
    width: int = 1
    heads: int = 1
    groups: int = 1
    size: int = 64
    nodes: tuple[int, ...] = ()
    counts: tuple[int, ...] | None = None
    page: int = 0
    scoring: Scoring = PLAIN
    sinks: bool = False
    wide_words: bool = False
    dtype: torch.dtype = torch.float32


CHECKS = {
    # Each of 5 programs has 3 tiles, of several units.
    "ragged lengths": Shape((70, 1, 33, 16), heads=2, groups=3),
    "one token": Shape((1,), dtype=torch.float16),
    "a unit in many pieces": Shape((193,), groups=8, dtype=torch.float16),
    "head size 96, several queries": Shape((37, 20), width=3, groups=3, size=96),
    "head size 128, paged": Shape((40, 77, 3), heads=2, groups=8, size=128, page=24, dtype=torch.float16),
    "empty sequence": Shape((0, 17), sinks=True),
    "window shorter than a tile": Shape((90, 5), width=2, groups=2, scoring=Scoring(window=7), sinks=True),
    "soft cap": Shape((50,), width=2, scoring=Scoring(scale=0.3, soft_cap=3.0)),
    "tree": Shape((45, 16), 9, 2, 3, nodes=(9, 5), sinks=True),
    "tree behind no prefix": Shape((0, 21), 7, groups=2, nodes=(7, 0), size=96),
    "tree of many words, paged": Shape((30,), 70, nodes=(70,), wide_words=True, page=16, dtype=torch.float16),
    "last nodes of a tree, window": Shape((40, 3), 4, 1, 2, nodes=(40, 9), counts=(4, 2), scoring=Scoring(window=5)),
    "tree, paged, window, soft cap": Shape(
        (35, 8), 6, 2, 2, nodes=(6, 3), page=8, scoring=Scoring(None, 12, 5.0), sinks=True, dtype=torch.float16
    ),
}


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of each check."""
    for name, shape in CHECKS.items():
        yield name, partial(check, shape, device, SMALL if device == "cpu" else None)
        if device != "cpu":
            yield f"{name}, bfloat16", partial(check, replace(shape, dtype=torch.bfloat16), device, None)
    yield "merge of segments", partial(check_merge, device)
    for window in (None, 9):
        yield f"shared prefixes, window {window}", partial(check_shared_prefixes, device, Scoring(window=window))
    if device != "cpu":
        large = Shape((8192, 1000), 64, 8, 4, 128, (64, 30), dtype=torch.bfloat16)
        yield "64 nodes behind 8192 tokens", partial(check, large, device, None)
        yield (
            "one query of 131072 keys",
            partial(check, Shape((131072,), 1, 8, 4, 128, dtype=torch.float16), device, None),
        )


def compilations() -> list[Compilation]:
    """Decoding, paged decoding, and a tree with all that it can have, each with the configuration that is launched."""
    merged = {"GROUPS": 4, "HEAD_SIZE": 128, "BLOCK_R": 2, "BLOCK_P": 16, "BLOCK_D": 128}
    pointers = ["o", "m", "l", "counts", "sinks", "out", "out_m", "out_l"]
    types = dict.fromkeys(pointers, "*fp32") | {"out": "*bf16", "counts": "*i32"}
    types |= {"ranges": "*i32"}
    return [
        replace(_compilation("decode", 8, 128), targets=("sm_90",)),
        _compilation("decode, paged", 8, 96, PAGED=True),
        *(
            _compilation(f"tree, {gpu}", 256, 128, gpu, **flags)
            for gpu in GPUS
            for flags in ({"TREE": True}, {"TREE": True, "WINDOWED": True, "CAPPED": True})
        ),
        Compilation(
            "merge",
            merge_kernel.merge_kernel,
            _signature(merge_kernel.merge_kernel, types),
            merged | {"STACKED": False, "COUNTED": True, "SINKS": True, "PARTIAL": False},
        ),
    ]


def _compilation(name: str, rows: int, size: int, gpu: str = "", **flags: bool) -> Compilation:
    kernel = triton_kernel.attention_kernel
    config = launch.config(rows, size, torch.bfloat16, gpu or "cuda", "WINDOWED" not in flags)
    types = dict.fromkeys(("queries", "keys", "values"), "*bf16") | dict.fromkeys(("o", "m", "l"), "*fp32")
    types |= {"scale": "fp32", "soft_cap": "fp32"}
    names = "table", "lengths", "nodes", "counts", "masks", "positions", "ranges"
    constants = {"HEADS": 8, "GROUPS": 4, "HEAD_SIZE": size, "BLOCK_B": 4, "BLOCK_D": 128}
    constants |= {"BLOCK_M": config.rows, "BLOCK_N": config.keys}
    constants |= dict.fromkeys(("PAGED", "TREE", "WINDOWED", "CAPPED"), False) | flags
    return Compilation(
        name,
        kernel,
        _signature(kernel, types | dict.fromkeys(names, "*i32")),
        constants,
        {"num_warps": config.warps, "num_stages": config.stages},
        tensor_cores=True,
        targets=GPUS.get(gpu, tuple(TARGETS)),
        aligned=("query_stride_b", "query_stride_n", "query_stride_h", "page_stride", "head_stride", "token_stride"),
    )


def _signature(kernel: object, types: dict[str, str]) -> dict[str, str]:
    """Type of each argument: capital letters are constants, what is not named is an integer."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    return {name: "constexpr" if name.isupper() else types.get(name, "i32") for name in names}


@dataclass(frozen=True)
class Inputs:
    """Arguments of an attention. parents: of each node of each tree, -1 for none."""

    queries: Tensor
    cache: Cache
    lengths: Tensor
    tree: Tree | None
    sinks: Tensor | None
    parents: list[list[int]]

    def to(self, device: str) -> "Inputs":
        """The same on a device. Elements of small tensors are not adjacent: zeros are between them."""

        def spread(part: Tensor | None) -> Tensor | None:
            return None if part is None else F.pad(part.to(device)[..., None], (0, 1))[..., 0]

        cache = Cache(self.cache.keys.to(device), self.cache.values.to(device), spread(self.cache.table))
        tree = None if self.tree is None else Tree(*map(spread, self.tree))
        lengths = spread(self.lengths)
        assert lengths is not None
        return Inputs(self.queries.to(device), cache, lengths, tree, spread(self.sinks), self.parents)

    def double(self) -> "Inputs":
        """The same in float64."""
        cache = Cache(self.cache.keys.double(), self.cache.values.double(), self.cache.table)
        sinks = None if self.sinks is None else self.sinks.double()
        return Inputs(self.queries.double(), cache, self.lengths, self.tree, sinks, self.parents)


def inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Random inputs on the CPU. Queries and keys are slices of larger tensors; pages are in random order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(shape.dtype)

    batch = len(shape.lengths)
    queries = normal(batch, shape.width, shape.heads * (shape.groups + 2), shape.size)
    queries = queries[:, :, : shape.heads * shape.groups]
    longest = max(a + b for a, b in zip(shape.lengths, shape.nodes or [0] * batch, strict=True))
    pages = -(-longest // shape.page) if shape.page else 1
    table = None
    if shape.page:
        table = torch.randperm(batch * pages, generator=generator).int().view(batch, pages)
    stored = normal(batch * pages, 2 * shape.heads, shape.page or longest + 3, shape.size)
    cache = Cache(stored[:, : shape.heads], stored[:, shape.heads :], table)
    parents = [[int(torch.randint(-1, node, (), generator=generator)) for node in range(n)] for n in shape.nodes]
    lengths = torch.tensor(shape.lengths, dtype=torch.int32)
    tree = _tree(shape, parents) if shape.nodes else None
    sinks = normal(shape.heads * shape.groups) if shape.sinks else None
    return Inputs(queries, cache, lengths, tree, sinks, parents)


def _tree(shape: Shape, parents: list[list[int]]) -> Tree:
    dtype, bits = (torch.int64, 64) if shape.wide_words else (torch.int32, 32)
    words = -(-max(shape.nodes) // bits)
    masks = torch.zeros(len(parents), shape.width, words, dtype=dtype)
    depths = torch.zeros(len(parents), max(shape.nodes), dtype=torch.int32)
    counts = shape.counts or shape.nodes
    for b, (above, count) in enumerate(zip(parents, counts, strict=True)):
        for absent in range(len(above), words * bits):  # bits that are to be ignored
            masks[b, :, absent // bits] |= torch.tensor(1, dtype=dtype) << (absent % bits)
        for node in range(len(above)):
            path = ancestors(above, node)
            depths[b, node] = len(path) - 1
            for seen in path if node >= len(above) - count else []:
                row = masks[b, node - len(above) + count]
                # The highest bit is the sign.
                row[seen // bits] |= torch.tensor(1, dtype=dtype) << (seen % bits)
    nodes = torch.tensor(shape.nodes, dtype=torch.int32)
    return Tree(masks, nodes, None if shape.counts is None else torch.tensor(counts, dtype=torch.int32), depths)


def ancestors(parents: list[int], node: int) -> list[int]:
    """The node and its ancestors."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path


def poisoned(*size: object, **options: object) -> Tensor:
    """torch.empty, filled with values that no kernel may leave or read."""
    tensor = torch.zeros(*size, **options)  # type: ignore[call-overload]
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))


def check(shape: Shape, device: str, config: Config | None) -> None:
    """AssertionError where the kernels on device differ from the reference in float64."""
    given = inputs(shape)
    own = given.to(device)
    with patch("torch.empty", poisoned):
        found = launch.attention(
            own.queries, own.cache, own.lengths, shape.scoring, None, own.tree, sinks=own.sinks, chosen=config
        )
    exact = given.double()
    expected = reference.attention(
        exact.queries, exact.cache, exact.lengths, shape.scoring, None, exact.tree, exact.sinks
    )
    assert found.dtype == shape.dtype
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=TOLERANCES[shape.dtype])


def check_merge(device: str) -> None:
    """AssertionError where a merge of two segments and one without keys, as a partial result or not, is wrong."""
    generator = torch.Generator().manual_seed(0)
    o, m = torch.randn(3, 2, 3, 40, generator=generator), torch.randn(3, 2, 3, generator=generator)
    m[1], o[1] = -torch.inf, 0
    m[:, 0, 0], o[:, 0, 0] = -torch.inf, 0
    partials = Partial(o, m, (m > -torch.inf).float() * 2)
    for sinks in (None, torch.randn(3, generator=generator)):
        own = Partial(*(part.to(device) for part in partials))
        with patch("torch.empty", poisoned):
            found = launch.merge(own, None if sinks is None else sinks.to(device), torch.float32)
        expected = reference.merge(Partial(*(part.double() for part in partials)), sinks, torch.float64)
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def check_shared_prefixes(device: str, scoring: Scoring) -> None:
    """AssertionError where sequences that share prefixes do not attend as if each had a cache of its own."""
    prefixes = inputs(Shape((20, 13), heads=2, groups=2, size=16))
    given = inputs(Shape((5, 0, 11, 1), width=2, heads=2, groups=2, size=16, sinks=True), seed=1)
    own, other = given.to(device), prefixes.to(device)
    with patch("torch.empty", poisoned):
        found = shared_prefix_attention(
            own.queries, other.cache, other.lengths, own.cache, own.lengths, scoring, sinks=own.sinks
        )
    exact = given.double()
    for b, length in enumerate(given.lengths.tolist()):
        shared = b // 2
        total = prefixes.lengths[shared : shared + 1] + length
        joined = Cache(
            *(
                torch.cat([first[shared, :, : int(total) - length], rest[b, :, :length]], 1)[None].double()
                for first, rest in zip(prefixes.cache[:2], given.cache[:2], strict=True)
            )
        )
        expected = reference.attention(exact.queries[b : b + 1], joined, total, scoring, None, None, exact.sinks)
        torch.testing.assert_close(found[b : b + 1].cpu().double(), expected, rtol=0, atol=TOLERANCES[torch.float32])
