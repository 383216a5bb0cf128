"""Benchmark cases of attention, with the heads of an 8B (32/8) and a 70B model (64/8), D = 128.

One query of one long sequence, one query and 64 nodes of a tree behind 8192 tokens, a batch of ragged lengths in
contiguous and paged caches, and a batch that shares a prefix. Peers are torch's scaled_dot_product_attention, with a
mask where one is needed, and FlexAttention.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.attention import launch, reference
from hasten.kernels.attention.contract import PLAIN, WORD_BITS, Cache, Tree
from hasten.kernels.timing import Case, Operands

_HEADS = ((8, 4), (8, 8))  # KV heads, query heads of each
_SIZE = 128


@dataclass(frozen=True)
class _Sizes:
    """lengths: keys of each sequence, before the nodes of its tree. prefix: of all sequences; 0 for none."""

    name: str
    lengths: tuple[int, ...]
    nodes: int = 0
    page: int = 0
    prefix: int = 0


_RAGGED = tuple(1024 + 512 * number for number in range(32))
_CASES = (
    _Sizes("decode", (131072,)),
    _Sizes("decode", (8192,)),
    _Sizes("tree", (8192,), nodes=64),
    _Sizes("decode", _RAGGED),
    _Sizes("decode", _RAGGED, page=16),
    _Sizes("shared prefix", (256,) * 32, prefix=8192),
)
_DRY_CASES = (
    _Sizes("decode", (40, 3), page=16),
    _Sizes("tree", (20,), nodes=9),
    _Sizes("shared prefix", (5, 3), prefix=18),
)


def cases(device: torch.device, dry: bool) -> Iterator[Case]:
    """A case for each problem and each kind of heads, BATCHxKEYS+NODES."""
    dtype = torch.float16 if dry else torch.bfloat16
    for heads, groups in ((1, 2),) if dry else _HEADS:
        for sizes in _DRY_CASES if dry else _CASES:
            problem = _Problem(sizes, heads, groups, dtype)
            keys = sum(sizes.lengths) + sizes.nodes * len(sizes.lengths) + sizes.prefix
            scored = sum(sizes.lengths) + (sizes.nodes + sizes.prefix) * len(sizes.lengths)
            rows = max(1, sizes.nodes) * heads * groups
            mean = sum(sizes.lengths) // len(sizes.lengths)
            shape = f"{sizes.name} {len(sizes.lengths)}x{mean}"
            shape += f"+{sizes.nodes} nodes" * bool(sizes.nodes) + f" prefix {sizes.prefix}" * bool(sizes.prefix)
            yield Case(
                op="attention",
                shape=f"{shape} {heads * groups}/{heads} heads" + f" page {sizes.page}" * bool(sizes.page),
                dtype=str(dtype).removeprefix("torch."),
                device_type=device.type,
                operands=problem.operands,
                kernel=problem.kernel,
                reference=problem.reference,
                nbytes=(2 * keys * heads + 2 * len(sizes.lengths) * rows) * _SIZE * dtype.itemsize,
                flops=4 * scored * rows * _SIZE,
                # An output is a mean of standard normal values, rounded to 8 bits or more like its weights: a tenth of
                # its own deviation is far above rounding, and far below what a wrong key or mask changes.
                atol=0.15 / (min(sizes.lengths) + sizes.prefix) ** 0.5,
                peers={} if dry or sizes.page or sizes.prefix else problem.peers(),
            )


@dataclass(frozen=True)
class _Problem:
    """Operands: queries (B, N, H * G, D); keys and values of the cache, and of the prefix, if there is one."""

    sizes: _Sizes
    heads: int
    groups: int
    dtype: torch.dtype

    def operands(self, generator: torch.Generator, device: torch.device) -> Operands:
        """New queries, keys and values."""
        sizes, page = self.sizes, self.sizes.page
        batch, longest = len(sizes.lengths), max(sizes.lengths) + sizes.nodes

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=self.dtype)

        queries = normal(batch, max(1, sizes.nodes), self.heads * self.groups, _SIZE)
        cached = batch * -(-longest // page) if page else batch, self.heads, page or longest, _SIZE
        stored = [normal(*cached) for _ in range(2)]
        if sizes.prefix:
            stored += [normal(1, self.heads, sizes.prefix, _SIZE) for _ in range(2)]
        return queries, *stored

    def kernel(self, queries: Tensor, keys: Tensor, values: Tensor, *prefix: Tensor) -> Tensor:
        """The Triton kernels."""
        own, lengths, tree = _facts(self.sizes, queries.device)
        if prefix:
            together, shared = self._shared(queries, prefix)
            suffix = Cache(keys, values, own)
            return launch.shared_prefix_attention(queries, together, *shared, suffix, lengths, PLAIN, None, None)
        return launch.attention(queries, Cache(keys, values, own), lengths, PLAIN, None, tree)

    def reference(self, queries: Tensor, keys: Tensor, values: Tensor, *prefix: Tensor) -> Tensor:
        """Torch."""
        own, lengths, tree = _facts(self.sizes, queries.device)
        if prefix:
            together, shared = self._shared(queries, prefix)
            suffix = Cache(keys, values, own)
            return reference.shared_prefix_attention(queries, together, *shared, suffix, lengths, PLAIN, None, None)
        return reference.attention(queries, Cache(keys, values, own), lengths, PLAIN, None, tree, None)

    def peers(self) -> Mapping[str, Callable[..., object]]:
        """Torch's own attention, which needs a contiguous cache.

        FlexAttention, which takes seconds to compile for each case, only for trees, where sdpa must read a mask.
        """
        return {"sdpa": self._sdpa} | ({"FlexAttention": self._flex} if self.sizes.nodes else {})

    def _shared(self, queries: Tensor, prefix: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Cache, Tensor]]:
        together = queries.view(1, -1, *queries.shape[2:])
        return together, (Cache(*prefix), _numbers((self.sizes.prefix,), queries.device))

    def _sdpa(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The query heads of a KV head are rows, as in the fast path; sequences of equal length need no mask."""
        rows = queries.unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return F.scaled_dot_product_attention(rows, keys, values, _mask(self.sizes, self.groups, queries.device))

    def _flex(self, queries: Tensor, keys: Tensor, values: Tensor) -> Any:
        flex, mask = _flex(self.sizes, queries.device)
        return flex(queries.transpose(1, 2), keys, values, block_mask=mask, enable_gqa=True)


@cache
def _numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@cache
def _facts(sizes: _Sizes, device: torch.device) -> tuple[Tensor | None, Tensor, Tree | None]:
    """Block table, with pages in random order; lengths; tree."""
    batch, table, tree = len(sizes.lengths), None, None
    if sizes.page:
        pages = -(-max(sizes.lengths) // sizes.page)
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
        table = order.view(batch, pages).int().to(device)
    if sizes.nodes:
        seen = _ancestors(sizes.nodes)
        weights = 1 << torch.arange(WORD_BITS, dtype=torch.int64)
        padded = F.pad(seen, (0, -sizes.nodes % WORD_BITS)).view(sizes.nodes, -1, WORD_BITS)
        masks = (padded * weights).sum(-1).to(torch.int32)[None].expand(batch, -1, -1).contiguous()
        tree = Tree(masks.to(device), _numbers((sizes.nodes,) * batch, device))
    return table, _numbers(sizes.lengths, device), tree


@cache
def _ancestors(nodes: int) -> Tensor:
    """Which nodes (N, N) each node of a random tree sees, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        seen[node] |= seen[int(torch.randint(0, node, (), generator=generator))]
    return seen


@cache
def _mask(sizes: _Sizes, groups: int, device: torch.device) -> Tensor | None:
    """Mask (B, 1, G * N, L); None if all queries see all keys."""
    if not sizes.nodes and len(set(sizes.lengths)) == 1:
        return None
    _, lengths, tree = _facts(sizes, device)
    longest = max(sizes.lengths) + sizes.nodes
    return reference.visible(max(1, sizes.nodes), longest, lengths, None, None, tree).repeat(1, groups, 1)[:, None]


@cache
def _flex(sizes: _Sizes, device: torch.device) -> tuple[Any, Any]:
    """FlexAttention, compiled, and its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = _mask(sizes, 1, device)
    width, longest = max(1, sizes.nodes), max(sizes.lengths) + sizes.nodes
    block_mask = None
    if mask is not None:

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[batch, 0, query, key]

        block_mask = create_block_mask(seen, len(sizes.lengths), None, width, longest, device=str(device))
    return torch.compile(flex_attention, dynamic=False), block_mask
