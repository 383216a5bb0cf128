"""Attention of one token in C: the reference in float64, and what it writes."""

import pytest
import torch

from hasten.kernels.token_attention import c_kernel, is_faster, reference, token_attention

pytestmark = pytest.mark.skipif(not c_kernel.is_available(64), reason="there is no C compiler")


def inputs(heads, kv_heads, size, capacity=140):
    generator = torch.Generator().manual_seed(heads * size)
    qkv = torch.randn(heads + 2 * kv_heads, size, generator=generator)
    return (
        qkv,
        torch.randn(size // 2, 2, generator=generator),
        torch.randn(2 * kv_heads, capacity, size, generator=generator),
    )


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(("position", "first"), [(0, 0), (1, 0), (17, 0), (100, 37), (139, 0), (9, 9)])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (8, 2, 128), (4, 4, 16), (8, 1, 96), (2, 1, 256)])
def test_it_equals_the_reference_in_float64(heads, kv_heads, size, position, first, cap):
    qkv, turns, cache = inputs(heads, kv_heads, size)
    wide = [tensor.double() for tensor in (qkv, turns, cache)]
    expected = reference.token_attention(*wide, position, first, size**-0.5, cap)
    # Neither what is behind the token nor what is before the window may be read.
    cache[:, position:] = torch.nan
    cache[:, :first] = torch.nan
    found = c_kernel.token_attention(qkv, turns, cache, position, first, size**-0.5, cap)
    # Scores of some tens, whose exponential functions differ by as many roundings.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache[:, position].double(), wide[2][:, position], rtol=1e-5, atol=1e-6)
    assert bool(cache[:, position + 1 :].isnan().all())


def test_large_and_equal_scores_give_weights_that_sum_to_one():
    qkv, turns, cache = inputs(2, 1, 64)
    cache[1] = 3.0
    qkv[:2] *= 100
    qkv[3] = 3.0
    found = token_attention(qkv, turns, cache, 99, 0, 1.0)
    torch.testing.assert_close(found, torch.full_like(found, 3.0), rtol=1e-6, atol=0)


def test_threads_do_not_change_a_bit():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            qkv, turns, cache = inputs(16, 4, 128, capacity=300)
            results.append(token_attention(qkv, turns, cache, 299, 0, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_heads_that_are_no_whole_vectors_and_other_dtypes_are_left_to_torch():
    assert is_faster(torch.zeros(2, 8, 64))
    assert not is_faster(torch.zeros(2, 8, 24))
    assert not is_faster(torch.zeros(2, 8, 512))
    assert not is_faster(torch.zeros(2, 8, 64, dtype=torch.bfloat16))
