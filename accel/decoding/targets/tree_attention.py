"""Attention of the new nodes of trees by kernels: ancestors as bit masks, no mask of the whole length.

For a GPU. It replaces rotary embedding, the writing of the caches, the additive mask and `scaled_dot_product_attention`
of attention.py. What differs between passes is one tensor of integers, so that a recorded pass is repeated with others.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.accel.decoding.targets.attention import attend_chain
from hasten.accel.decoding.targets.families.decoder import Decoder, Layer
from hasten.accel.decoding.tree import ROOT
from hasten.kernels.attention import Cache, Scoring, Tree, tree_attention
from hasten.kernels.attention.contract import WORD_BITS
from hasten.kernels.rotary_append import rotary_append

# Each part of a packed tensor begins at a multiple of this, in integers: Triton compiles a kernel again for pointers
# that are not multiples of 16 bytes.
_ALIGNMENT = 4


class TreeShape(NamedTuple):
    """Sizes of a pass: B sequences, N new nodes of each, at most `nodes` waiting nodes, the new ones among them."""

    batch: int
    width: int
    nodes: int

    @property
    def words(self) -> int:
        """Words of a node's mask."""
        return -(-self.nodes // WORD_BITS)


class TreeInputs(NamedTuple):
    """What the attention of all layers of a pass reads, besides queries and caches; int32 tensors on the device.

    slots: (B, 1). lengths: (B,), committed tokens of each slot. tree: see hasten.kernels.attention.Tree. rows, places:
    (B * N,), slot and cache position of each new node; the slot of padding is -1.
    """

    slots: Tensor
    lengths: Tensor
    tree: Tree
    rows: Tensor
    places: Tensor

    @classmethod
    def of(cls, packed: Tensor, shape: TreeShape) -> "TreeInputs":
        """Views of what `pack_tree` returned."""
        batch, width, nodes = shape
        sizes = [batch] * 4 + [batch * width] * 2 + [batch * nodes, batch * width * shape.words]
        starts = [0, *accumulate(_aligned(size) for size in sizes)]
        slots, lengths, waiting, counts, rows, places, depths, masks = (
            packed.narrow(0, start, size) for start, size in zip(starts, sizes, strict=False)
        )
        tree = Tree(masks.view(batch, width, shape.words), waiting, counts, depths.view(batch, nodes))
        return cls(slots[:, None], lengths, tree, rows, places)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pack_tree(
    slots: Sequence[int],
    committed: Sequence[int],
    parents: Sequence[Sequence[int]],
    counts: Sequence[int],
    shape: TreeShape,
) -> Tensor:
    """The inputs of a pass as one int32 tensor on the CPU, for `TreeInputs.of`.

    committed: number of committed tokens of each slot. parents: of all waiting nodes of each slot, those of this pass
    included: indices smaller than the node's own, or ROOT. counts: number of nodes of this pass, which are the last.
    shape: sizes of this pass, or larger ones.
    """
    rows: list[int] = []
    places: list[int] = []
    depths: list[int] = []
    masks = bytearray()
    for slot, length, above, count in zip(slots, committed, parents, counts, strict=True):
        # Integers of any length: a node sees what its parent sees, and itself.
        seen: list[int] = []
        own: list[int] = []
        for node, parent in enumerate(above):
            seen.append((0 if parent == ROOT else seen[parent]) | 1 << node)
            own.append(0 if parent == ROOT else own[parent] + 1)
        padding, first = [0] * (shape.width - count), len(above) - count
        rows += [slot] * count + [-1] * len(padding)
        places += [*range(length + first, length + len(above)), *padding]
        depths += own + [0] * (shape.nodes - len(own))
        for mask in [*seen[first:], *padding]:
            masks += mask.to_bytes(shape.words * WORD_BITS // 8, "little")
    words = torch.frombuffer(masks, dtype=torch.int32)
    numbers: list[int] = []
    for part in (slots, committed, [*map(len, parents)], counts, rows, places, depths):
        numbers += [*part, *[0] * (_aligned(len(part)) - len(part))]
    return torch.cat([torch.tensor(numbers, dtype=torch.int32), words])


class KernelAttention:
    """The attention of the layers of a pass, see MaskedAttention.

    tables: (capacity, D / 2, 2) of every rotation. positions: (B * N,). prompt: slot of a pass over the first tokens of
    one sequence; None for other passes.
    """

    def __init__(
        self,
        decoder: Decoder,
        tables: Sequence[Tensor],
        positions: Tensor,
        inputs: TreeInputs,
        prompt: int | None = None,
    ) -> None:
        self._decoder, self._tables, self._positions, self._inputs = decoder, tables, positions, inputs
        self._prompt = None if decoder.score_cap is not None else prompt

    def __call__(self, layer: Layer, cache: Tensor, qkv: Tensor) -> Tensor:
        """Outputs (B * N, H * G * D) of queries, keys and values (B * N, (H * G + 2 * H) * D), which are not rotated.

        Keys and values are written into the cache (slots, 2 * H, capacity, D) of the layer. Outputs of padding are 0.
        """
        decoder, inputs = self._decoder, self._inputs
        query_norm, key_norm = layer.query_norm, layer.key_norm
        queries = rotary_append(
            qkv.view(len(qkv), -1, decoder.head_size),
            self._tables[layer.rotation],
            self._positions,
            cache,
            inputs.rows,
            inputs.places,
            interleaved=True,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            eps=0.0 if query_norm is None else query_norm.eps,
        )
        width, capacity = inputs.tree.masks.shape[1], cache.shape[2]
        if self._prompt is not None and (layer.window is None or layer.window >= width):
            # torch's product of blocks, which skips half of the scores.
            return attend_chain(decoder, queries, cache[self._prompt, None, :, :width])
        window = None if layer.window is None or layer.window >= capacity else layer.window
        return attend_tree(queries, cache, inputs, Scoring(decoder.scale, window, decoder.score_cap))


def attend_tree(
    queries: Tensor, cache: Tensor, inputs: TreeInputs, scoring: Scoring, sinks: Tensor | None = None
) -> Tensor:
    """Attention outputs (B * N, H * G * D) of queries (B * N, H * G, D); 0 for padding.

    cache: keys and values (slots, 2 * H, capacity, D) of a layer, those of the new nodes among them. sinks: (H * G,)
    logits.
    """
    keys, values = cache.chunk(2, 1)
    batch, width, _ = inputs.tree.masks.shape
    attended = tree_attention(
        queries.view(batch, width, *queries.shape[1:]),
        Cache(keys, values, inputs.slots),
        inputs.lengths,
        inputs.tree,
        scoring,
        sinks=sinks,
    )
    return attended.view(batch * width, -1)
