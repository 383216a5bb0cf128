"""Attention of the new nodes of trees by the kernel: ancestors as bit masks, no mask of the whole length.

For a GPU. It replaces the additive mask and `scaled_dot_product_attention` of a pass whose nodes need a mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.accel.decoding.tree import ROOT
from hasten.kernels.attention import Cache, Scoring, Tree, tree_attention
from hasten.kernels.attention.contract import WORD_BITS


class TreeInputs(NamedTuple):
    """What the attention of all layers of a pass reads, besides queries and caches; tensors on the device.

    slots: (B, 1) int32. lengths: (B,) int32, committed tokens of each slot. tree: see hasten.kernels.attention.Tree.
    """

    slots: Tensor
    lengths: Tensor
    tree: Tree


def tree_inputs(
    slots: Sequence[int],
    committed: Sequence[int],
    parents: Sequence[Sequence[int]],
    counts: Sequence[int],
    device: torch.device,
) -> TreeInputs:
    """The inputs of a pass, computed on the CPU and copied to the device once.

    committed: number of committed tokens of each slot. parents: of all waiting nodes of each slot, those of this pass
    included: indices smaller than the node's own, or ROOT. counts: number of nodes of this pass, which are the last.
    """
    batch, width, longest = len(slots), max(counts), max(map(len, parents))
    words = -(-longest // WORD_BITS)
    numbers = [*slots, *committed, *map(len, parents), *counts]
    depths = torch.zeros(batch, longest, dtype=torch.int32)
    rows = bytearray()
    for row, (above, count) in enumerate(zip(parents, counts, strict=True)):
        # Integers of any length: a node sees what its parent sees, and itself.
        seen: list[int] = []
        own: list[int] = []
        for node, parent in enumerate(above):
            seen.append((0 if parent == ROOT else seen[parent]) | 1 << node)
            own.append(0 if parent == ROOT else own[parent] + 1)
        depths[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        for mask in [*seen[len(seen) - count :], *[0] * (width - count)]:
            rows += mask.to_bytes(words * WORD_BITS // 8, "little")
    masks = torch.frombuffer(rows, dtype=torch.int32)
    packed = torch.cat([torch.tensor(numbers, dtype=torch.int32), depths.view(-1), masks]).to(device)
    places, lengths, nodes, own_counts = packed[: 4 * batch].view(4, batch)
    start = 4 * batch + depths.numel()
    tree = Tree(
        packed[start:].view(batch, width, words), nodes, own_counts, packed[4 * batch : start].view(batch, longest)
    )
    return TreeInputs(places[:, None], lengths, tree)


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
