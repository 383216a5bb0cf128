"""Attention of one token over a compressed cache in C: the reference, what it writes, and what it may not read."""

import pytest
import torch

from hasten.kernels.quantize_pack import quantize_pack
from hasten.kernels.segmented_token import DenseOperands, PackedOperands, c_kernel, prepare, reads, reference
from hasten.kernels.segmented_token import segmented_token as attended

pytestmark = pytest.mark.skipif(not c_kernel.is_available(64), reason="there is no C compiler")
CAPACITY, PLACE = 20, 11


def segments(kv_heads, size):
    """Heads of equal lengths with biases, heads of different lengths of which one is empty, and packed ones."""
    generator = torch.Generator().manual_seed(size)

    def made(tokens):
        return torch.randn(kv_heads, tokens, size, generator=generator)

    lengths = [33 - 3 * head if head else 0 for head in range(kv_heads)]
    keys, values = made(64), made(64)
    return {
        "none": [],
        "biased": [DenseOperands(list(made(45)), list(made(45)), torch.randn(kv_heads, 45, generator=generator))],
        "ragged": [DenseOperands(*([made(length)[0] for length in lengths] for _ in range(2)))],
        "packed": [
            PackedOperands(
                quantize_pack(keys.transpose(0, 1).flatten(1), 4, "channel", 32),
                quantize_pack(values.transpose(0, 1).flatten(0, 1), 4, "token", min(size, 64)),
                kv_heads,
            )
        ],
    }


def inputs(heads, kv_heads, size):
    generator = torch.Generator().manual_seed(heads * size)
    # Rows behind the token's own may not be read.
    keys, values = (torch.randn(kv_heads, CAPACITY, size, generator=generator) for _ in range(2))
    keys[:, PLACE:], values[:, PLACE:] = torch.nan, torch.nan
    qkv = torch.randn(heads + 2 * kv_heads, size, generator=generator)
    return qkv, torch.randn(size // 2, 2, generator=generator), keys, values, torch.zeros(CAPACITY, dtype=torch.int32)


def run(kernel, shape, own, turned, cap=None):
    given = inputs(*shape)
    found = kernel(*given[:2], turned, *given[2:], 77, PLACE, prepare(own), 0.2, cap)
    return found, given[2:]


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("kinds", [("none",), ("biased", "ragged"), ("packed",), ("ragged", "packed", "biased")])
@pytest.mark.parametrize(
    ("shape", "turned"), [((9, 3, 64), 64), ((8, 2, 128), 32), ((4, 4, 32), 32), ((40, 2, 64), 64), ((2, 2, 256), 256)]
)
def test_it_equals_the_reference(shape, turned, kinds, cap):
    own = [segment for kind in kinds for segment in segments(*shape[1:])[kind]]
    (found, written), (expected, expected_written) = (
        run(kernel, shape, own, turned, cap) for kernel in (c_kernel.segmented_token, reference.segmented_token)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(written, expected_written, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert written[2][PLACE] == 77
    assert bool(written[0][:, PLACE + 1 :].isnan().all())


def test_the_denominators_are_those_of_softmax_over_all_tokens():
    (dense,) = segments(3, 64)["biased"]
    dense = DenseOperands(dense.keys, dense.values)
    (output, queries, denominators), (keys, values, _) = run(attended, (9, 3, 64), [dense], 64)
    keys, values = (
        torch.cat([torch.stack(list(old)), own[:, : PLACE + 1]], 1).double()
        for old, own in ((dense.keys, keys), (dense.values, values))
    )
    scores = queries.view(3, 3, 64).double() * 0.2 @ keys.mT
    torch.testing.assert_close(denominators.view(3, 3).double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.view(3, 3, 64).double(), scores.softmax(-1) @ values, rtol=1e-4, atol=1e-5)


def test_threads_change_no_bit():
    before, results = torch.get_num_threads(), []
    own = [segment for kind in segments(4, 128).values() for segment in kind]
    try:
        for threads in (1, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(c_kernel.segmented_token, (16, 4, 128), own * 6, 128)[0])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_what_the_kernel_does_not_read_is_left_to_torch():
    keys = torch.zeros(2, 8, 64)
    dense = DenseOperands(list(keys), list(keys))
    assert reads([dense, *segments(2, 64)["packed"]], keys)
    assert not reads([], torch.zeros(2, 8, 24))
    assert not reads([], keys.bfloat16())
    assert not reads([DenseOperands(list(keys.bfloat16()), list(keys.bfloat16()))], keys)
    apart = torch.zeros(2, 64, 8).mT
    assert not reads([DenseOperands(list(apart), list(apart))], keys)
    three = quantize_pack(torch.zeros(32, 128), 3, "channel", 32), quantize_pack(torch.zeros(64, 64), 3, "token", 64)
    assert not reads([PackedOperands(*three, 2)], keys)


def test_nothing_is_held_beside_the_segments():
    own = [segment for kind in segments(2, 64).values() for segment in kind]
    held = {tensor.data_ptr() for segment in own for tensor in segment.tensors()}
    assert {tensor.data_ptr() for tensor in prepare(own).tensors()} == held
