"""The torch reference of attention against one query at a time, and what holds of partial results."""

from dataclasses import replace

import pytest
import torch

from hasten.kernels.attention import (
    Cache,
    Partial,
    Scoring,
    Tree,
    decode_attention,
    merge,
    partial_attention,
    tree_attention,
)
from tests.kernels.ops.attention import CHECKS, Inputs, Shape, ancestors, check_shared_prefixes, inputs


def attended(shape: Shape, given: Inputs, b: int, query: int) -> torch.Tensor:
    """Attention (H * G, D) of one query over the keys that it sees, from the definition."""
    length, count = shape.lengths[b], shape.nodes[b] if shape.nodes else 0
    counts = shape.counts or shape.nodes
    positions = list(range(length))
    seen = list(range(length))
    position = length - 1
    if shape.nodes:
        if query >= counts[b]:
            return torch.zeros(shape.heads * shape.groups, shape.size, dtype=torch.float64)
        paths = [ancestors(given.parents[b], node) for node in range(count)]
        node = count - counts[b] + query
        positions += [length + len(path) - 1 for path in paths]
        seen += [length + other for other in paths[node]]
        position = positions[length + node]
    if shape.scoring.window is not None:
        seen = [key for key in seen if position - positions[key] < shape.scoring.window]
    outputs = []
    for head in range(shape.heads * shape.groups):
        row = given.queries[b, query, head]
        scores, values = [], []
        for key in seen:
            page, token = divmod(key, given.cache.page_size)
            page = b if given.cache.table is None else int(given.cache.table[b, page])
            place = page, head // shape.groups, token
            score = row @ given.cache.keys[place] * (shape.scoring.scale or shape.size**-0.5)
            cap = shape.scoring.soft_cap
            scores.append(score if cap is None else cap * torch.tanh(score / cap))
            values.append(given.cache.values[place])
        if given.sinks is not None:
            scores.append(given.sinks[head])
            values.append(torch.zeros_like(row))
        outputs.append(torch.stack(scores).softmax(0) @ torch.stack(values) if scores else torch.zeros_like(row))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", CHECKS)
def test_reference_equals_one_query_at_a_time(name):
    shape = replace(CHECKS[name], dtype=torch.float32)
    given = inputs(shape)
    if given.tree is None:
        found = decode_attention(given.queries, given.cache, given.lengths, shape.scoring, sinks=given.sinks)
    else:
        found = tree_attention(given.queries, given.cache, given.lengths, given.tree, shape.scoring, sinks=given.sinks)
    queries = sorted({0, shape.width // 2, shape.width - 1})
    exact = given.double()
    for b in range(len(shape.lengths)):
        for query in queries:
            expected = attended(shape, exact, b, query)
            # Sums in float32 in another order.
            torch.testing.assert_close(found[b, query].double(), expected, rtol=1e-5, atol=1e-5)


def test_partial_results_of_segments_merge_to_the_whole():
    shape = Shape((30, 12), width=2, heads=2, groups=3, size=16, sinks=True)
    given = inputs(shape)
    whole = decode_attention(given.queries, given.cache, given.lengths, sinks=given.sinks)
    first = torch.tensor([10, 12], dtype=torch.int32)  # the second segment of the second sequence is empty
    rest = Cache(*(torch.stack([part[0].roll(-10, 1), part[1].roll(-12, 1)]) for part in given.cache[:2]))
    parts = [
        partial_attention(given.queries, given.cache, first),
        partial_attention(given.queries, rest, given.lengths - first),
    ]
    assert not parts[1].o[1].any()
    assert (parts[1].m[1] == -torch.inf).all()
    assert not parts[1].l[1].any()
    stacked = Partial(*(torch.stack(part) for part in zip(*parts, strict=True)))
    torch.testing.assert_close(merge(stacked, sinks=given.sinks), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 9])
def test_sequences_that_share_a_prefix_attend_as_if_each_had_its_own(window):
    check_shared_prefixes("cpu", Scoring(window=window))


def test_arguments_that_do_not_fit_are_refused():
    given = inputs(Shape((5, 4), heads=2, groups=2, size=16))
    tree = Tree(torch.zeros(2, 1, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="lengths must be"):
        decode_attention(given.queries, given.cache, given.lengths.long())
    with pytest.raises(ValueError, match="3 heads"):
        decode_attention(given.queries[:, :, :3], given.cache, given.lengths)
    with pytest.raises(ValueError, match="depths must be"):
        tree_attention(given.queries, given.cache, given.lengths, tree, Scoring(window=3))
    with pytest.raises(ValueError, match="equal strides"):
        decode_attention(given.queries, given.cache._replace(values=given.cache.values.contiguous()), given.lengths)
    with pytest.raises(ValueError, match="window=0"):
        Scoring(window=0)
