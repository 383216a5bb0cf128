"""Attention of a tree's nodes by bit masks equals attention under a mask of the whole length."""

import pytest
import torch
import torch.nn.functional as F

from hasten.accel.decoding.targets.tree_attention import TreeInputs, TreeShape, attend_tree, pack_tree
from hasten.accel.decoding.tree import ROOT
from hasten.kernels.attention import Scoring

HEADS, GROUPS, SIZE = 2, 3, 16
SLOTS = [2, 0]
COMMITTED = [7, 19]
# The first tree's first two nodes were run by an earlier pass; the second has more nodes than a word has bits.
PARENTS = [[ROOT, 0, ROOT, 1, 2], [ROOT, *(node // 2 for node in range(39))]]
COUNTS = [3, 40]


@pytest.mark.parametrize("window", [None, 6])
def test_bit_masks_equal_a_mask_of_the_whole_length(window):
    generator = torch.Generator().manual_seed(0)
    width = max(COUNTS)
    queries = torch.randn(2 * width, HEADS * GROUPS, SIZE, generator=generator)
    cache = torch.randn(3, 2 * HEADS, 64, SIZE, generator=generator)
    shape = TreeShape(2, width, max(map(len, PARENTS)))
    inputs = TreeInputs.of(pack_tree(SLOTS, COMMITTED, PARENTS, COUNTS, shape), shape)
    found = attend_tree(queries, cache, inputs, Scoring(window=window)).view(2, width, HEADS * GROUPS, SIZE)
    for row, (slot, committed, parents, count) in enumerate(zip(SLOTS, COMMITTED, PARENTS, COUNTS, strict=True)):
        total, first = committed + len(parents), len(parents) - count
        seen = torch.zeros(count, total, dtype=torch.bool)
        depths = []
        for parent in parents:
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        for query in range(count):
            seen[query, :committed] = True
            node = first + query
            while node != ROOT:
                seen[query, committed + node] = True
                node = parents[node]
        if window is not None:
            positions = torch.tensor([*range(committed), *(committed + depth for depth in depths)])
            seen &= positions[committed + first :, None] - positions < window
        keys, values = cache[slot, :, :total].chunk(2)
        own = queries.view(2, width, -1, SIZE)[row, :count].transpose(0, 1)
        expected = F.scaled_dot_product_attention(own[None], keys[None], values[None], seen, enable_gqa=True)[0]
        torch.testing.assert_close(found[row, :count], expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
        assert not found[row, count:].any()
