"""The C kernel of attention over packed keys and values against its reference, and both against float64."""

import os
import platform
from dataclasses import replace

import pytest
import torch

from hasten.kernels import compiled
from hasten.kernels.packed_attention import c_kernel, is_faster, packed_attention, reference
from hasten.kernels.quantize_pack import quantize_pack, unpack_dequantize

SHAPES = [(1, 1, 64, 32), (3, 2, 64, 96), (4, 2, 128, 160), (1, 3, 64, 64), (70, 1, 64, 32), (2, 1, 256, 64)]


@pytest.fixture(autouse=True)
def compiler():
    if not c_kernel.is_available(4, 64):
        pytest.skip("there is no C compiler")


def operands(rows, heads, size, tokens, bits, dtype=torch.float32, group=32, magnitude=1.0):
    generator = torch.Generator().manual_seed(rows + size + bits)
    queries = torch.randn(heads, rows, size, generator=generator) * size**-0.5
    keys, values = (torch.randn(heads, tokens, size, generator=generator).to(dtype) for _ in range(2))
    keys[..., size // 2] *= 20  # an outlier channel
    keys, values = keys * magnitude, values * magnitude
    width = size if size % 32 else min(size, 64)
    return (
        queries,
        quantize_pack(keys.transpose(0, 1).flatten(1), bits, "channel", group),
        quantize_pack(values.transpose(0, 1).flatten(0, 1), bits, "token", width),
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_kernel_computes_what_the_reference_does(shape, bits, cap):
    given = operands(*shape, bits)
    found, expected = c_kernel.packed_attention(*given, 0.5, cap), reference.packed_attention(*given, 0.5, cap)
    torch.testing.assert_close(found.m, expected.m, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.o / found.l[..., None], expected.o / expected.l[..., None], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_attention_in_float64(dtype):
    given = operands(3, 2, 64, 96, 4, dtype)
    # What scales are multiplied by is not rounded to the dtype of what was packed.
    exact_keys, exact_values = (unpack_dequantize(replace(part, dtype=torch.float64)) for part in given[1:])
    dense_keys = exact_keys.unflatten(1, (2, -1)).transpose(0, 1)
    dense_values = exact_values.unflatten(0, (-1, 2)).transpose(0, 1)
    exact = (given[0].double() @ dense_keys.mT).softmax(-1) @ dense_values
    for kernel in (c_kernel, reference) if dtype == torch.float32 else (c_kernel,):
        found = kernel.packed_attention(*given, 1.0, None)
        torch.testing.assert_close((found.o / found.l[..., None]).double(), exact, rtol=1e-4, atol=1e-5)


def check_small_scales(kernel):
    # Scales from the least number of float16 on, most of them subnormal there.
    for magnitude in (1e-7, 1e-6, 1e-4):
        given = operands(3, 2, 64, 96, 4, magnitude=magnitude)
        found, expected = (one.packed_attention(*given, 1 / magnitude, None) for one in (kernel, reference))
        torch.testing.assert_close(found.m, expected.m, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            found.o / found.l[..., None], expected.o / expected.l[..., None], rtol=1e-3, atol=1e-4 * magnitude
        )
        assert float(given[2].scale.max()) < 2**-14


def test_subnormal_scales_are_read():
    check_small_scales(c_kernel)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have the plain C already")
def test_a_processor_without_instructions_for_float16_reads_the_same(monkeypatch):
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} -mno-f16c -mno-avx512f")
    monkeypatch.setattr(c_kernel, "load_library", compiled.load_library.__wrapped__)
    own = c_kernel._function.__wrapped__()
    assert own is not None
    monkeypatch.setattr(c_kernel, "_function", lambda: own)
    check_small_scales(c_kernel)
    given = operands(4, 2, 128, 160, 2)
    found, expected = c_kernel.packed_attention(*given, 0.5, None), reference.packed_attention(*given, 0.5, None)
    torch.testing.assert_close(found.o / found.l[..., None], expected.o / expected.l[..., None], rtol=1e-3, atol=1e-4)


def test_threads_change_no_bit():
    given = operands(4, 4, 128, 2048, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = c_kernel.packed_attention(*given, 1.0, None)
        torch.set_num_threads(2)
        two = c_kernel.packed_attention(*given, 1.0, None)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_row_of_queries_does_not_depend_on_the_others():
    queries, keys, values = operands(70, 1, 64, 64, 4)
    whole = c_kernel.packed_attention(queries, keys, values, 1.0, None)
    for row in (0, 63, 64, 69):
        alone = c_kernel.packed_attention(queries[:, row : row + 1], keys, values, 1.0, None)
        assert torch.equal(alone.o[:, 0], whole.o[:, row])


@pytest.mark.parametrize(("bits", "size"), [(3, 64), (4, 12), (2, 8), (2, 32)])
def test_other_widths_take_the_reference(bits, size):
    assert not c_kernel.is_available(bits, size)
    if size == 64:
        given = operands(1, 2, size, 32, bits)
        assert not is_faster(given[1], 2)
        torch.testing.assert_close(packed_attention(*given).o, reference.packed_attention(*given, 1.0, None).o)
