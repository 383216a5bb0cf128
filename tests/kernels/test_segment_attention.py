"""Attention over a segment of a cache in C: the reference in float64, masks, heads of different lengths, merging."""

from itertools import pairwise

import pytest
import torch

from hasten.kernels.attention.contract import Partial
from hasten.kernels.segment_attention import c_kernel, is_faster, merged_attention, reference, segment_attention

pytestmark = pytest.mark.skipif(not c_kernel.is_available(64), reason="there is no C compiler")


def operands(heads, rows, size, tokens):
    generator = torch.Generator().manual_seed(rows + size + tokens)
    queries = torch.randn(heads, rows, size, generator=generator)
    # A view of a larger cache, whose other rows may not be read.
    keys, values = (torch.full((heads, tokens + 7, size), torch.nan) for _ in range(2))
    for part in (keys, values):
        part[:, :tokens] = torch.randn(heads, tokens, size, generator=generator)
    return queries, keys[:, :tokens], values[:, :tokens]


def check(found, expected):
    torch.testing.assert_close(found.m.double(), expected.m.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.l.double(), expected.l.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.o.double(), expected.o.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 64, 1), (3, 3, 64, 100), (2, 4, 128, 33), (1, 5, 16, 50), (2, 33, 96, 64), (1, 2, 256, 40)]
)
def test_it_equals_the_reference_in_float64(shape, cap):
    given = operands(*shape)
    # l and o depend on m alone, which both take to be the largest score.
    check(segment_attention(*given, 0.2, cap), in_float64(*given, 0.2, cap))


def in_float64(queries, keys, values, scale, cap=None, seen=None, bias=None):
    scores = queries.double() * scale @ keys.double().mT
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores if bias is None else scores + bias[:, None]
    if seen is not None:
        scores = scores.masked_fill(
            ~seen.repeat(*(1,) * (seen.ndim - 2), queries.shape[1] // seen.shape[-2], 1), -torch.inf
        )
    largest = scores.amax(-1)
    weights = (scores - largest.nan_to_num(neginf=0.0)[..., None]).exp()
    return Partial(weights @ values.double(), largest, weights.sum(-1))


@pytest.mark.parametrize("by_head", [False, True])
def test_masks_and_biases_are_those_of_the_query_of_a_row(by_head):
    queries, keys, values = operands(2, 6, 64, 45)  # three heads of two queries
    seen = torch.rand(2, 2, 45, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, 1, :] = False  # a query that sees nothing
    bias = torch.randn(2, 45, generator=torch.Generator().manual_seed(1))
    seen = seen if by_head else seen[0]
    found = segment_attention(queries, keys, values, 0.1, None, seen, bias)
    check(found, in_float64(queries, keys, values, 0.1, None, seen, bias))
    assert bool((found.l[:, 1::2] == 0).all())
    assert bool((found.o[:, 1::2] == 0).all())


def test_heads_may_have_different_numbers_of_keys():
    queries, keys, values = operands(3, 2, 64, 40)
    lengths = [40, 17, 0]
    parts = [[part[head, :length] for head, length in enumerate(lengths)] for part in (keys, values)]
    found = segment_attention(queries, *parts, 0.1)
    check(found, reference.segment_attention(queries, *parts, 0.1, None, None, None))
    assert found.l[2].eq(0).all()


def test_a_row_does_not_depend_on_the_others_by_a_single_bit():
    queries, keys, values = operands(1, 40, 64, 70)
    whole = segment_attention(queries, keys, values, 0.1)
    for row in (0, 2, 15, 16, 39):
        alone = segment_attention(queries[:, row : row + 1], keys, values, 0.1)
        assert torch.equal(alone.o[:, 0], whole.o[:, row])
        assert torch.equal(alone.l[:, 0], whole.l[:, row])


def test_threads_change_no_bit():
    before, results = torch.get_num_threads(), []
    given = operands(4, 4, 128, 300)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(segment_attention(*given, 0.1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("with_sinks", [False, True])
def test_merged_parts_are_attention_over_all_keys(with_sinks):
    queries, keys, values = operands(2, 3, 64, 60)
    sinks = torch.tensor([0.5, -1.0, 9.0]) if with_sinks else None
    ends = [0, 10, 10, 45, 60]  # one part has no keys
    parts = [
        segment_attention(queries, keys[:, start:stop], values[:, start:stop], 0.1) for start, stop in pairwise(ends)
    ]
    scores = queries.double() * 0.1 @ keys.double().mT
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().expand(2, 3)[..., None]], -1)
    expected = scores.softmax(-1)[..., :60] @ values.double()
    for merge in (merged_attention, reference.merged_attention):
        output, denominators = merge(parts, sinks)
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(denominators.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_row_without_keys_is_zero():
    nothing = Partial(torch.zeros(1, 2, 64), torch.full((1, 2), -torch.inf), torch.zeros(1, 2))
    assert merged_attention([nothing, nothing])[0].eq(0).all()


def test_other_dtypes_sizes_and_many_rows_are_left_to_torch():
    keys = torch.zeros(1, 8, 64)
    assert is_faster(torch.zeros(1, 3, 64), keys, keys)
    assert not is_faster(torch.zeros(1, 768, 64), keys, keys)
    assert not is_faster(torch.zeros(1, 3, 64), keys.bfloat16(), keys.bfloat16())
    assert not is_faster(torch.zeros(1, 3, 64), keys, torch.zeros(1, 8, 32))
    narrow = torch.zeros(1, 8, 24)
    assert not is_faster(narrow, narrow, narrow)
