"""Sums of x xᵀ in panels, by C that is compiled here, and by torch."""

import pytest
import torch

from hasten.kernels import compiled, second_moment
from hasten.kernels.second_moment import c_kernel, reference

SIZES = [(1, 1), (1, 40), (2, 31), (255, 32), (256, 33), (257, 100), (600, 200), (513, 300)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(tokens, columns, dtype):
    generator = torch.Generator().manual_seed(tokens * columns)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def empty(columns, width):
    return torch.zeros(sum((stop - start) * stop for start, stop in second_moment.panel_bounds(columns, width)))


def check(sums, x, width, begin=0.0):
    exact = begin + x.double().T @ x.double()
    bounds = second_moment.panel_bounds(x.shape[1], width)
    for (start, stop), panel in zip(bounds, second_moment.panels(sums, x.shape[1], width), strict=True):
        torch.testing.assert_close(panel.double(), exact[start:stop, :stop], atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("width", [32, 128, 256])
def test_both_sum_the_products_of_all_pairs_of_columns(size, dtype, width):
    x = inputs(*size, dtype)
    for add in (second_moment.add, reference.add):
        sums = empty(size[1], width)
        add(sums, x, width)
        check(sums, x, width)
        # A second call adds to what is there.
        add(sums, x, width)
        check(sums / 2, x, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_right_with_fewer_instructions(with_fewer_instructions, dtype):
    with_fewer_instructions(c_kernel)
    for tokens, columns in SIZES:
        x, sums = inputs(tokens, columns, dtype), empty(columns, 128)
        c_kernel.add(sums, x, 128)
        check(sums, x, 128)


def test_sums_are_the_same_to_the_bit_on_any_threads(threads):
    x = inputs(700, 200, torch.bfloat16)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(empty(200, 128))
        second_moment.add(found[-1], x, 128)
    assert all(torch.equal(one, found[0]) for one in found)


def test_without_a_compiler_torch_sums(monkeypatch):
    x, sums = inputs(60, 40, torch.bfloat16), empty(40, 32)
    monkeypatch.setattr(c_kernel, "load_library", lambda source: None)
    c_kernel._library.cache_clear()
    assert not c_kernel.is_faster(torch.float32)
    second_moment.add(sums, x, 32)
    c_kernel._library.cache_clear()
    check(sums, x, 32)


def test_the_kernel_is_used_where_it_is_faster():
    if compiled.load_library(c_kernel.SOURCE) is None:
        pytest.skip("there is no C compiler")
    abilities = c_kernel._library().second_moment_abilities()
    assert c_kernel.is_faster(torch.float32) == bool(abilities & 1)
    if not torch.cpu._is_amx_tile_supported():
        assert c_kernel.is_faster(torch.bfloat16) == bool(abilities)


@pytest.mark.parametrize("module", [second_moment, reference], ids=["kernel", "torch"])
@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("columns", [1, 40, 300])
def test_panels_are_spread_to_a_matrix_of_another_order(module, columns, width):
    x = inputs(50, columns, torch.float32)
    sums = empty(columns, width)
    second_moment.add(sums, x, width)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    out = torch.full((columns, columns), torch.nan)
    bounds = second_moment.panel_bounds(columns, width)
    for (start, _), panel in zip(bounds, second_moment.panels(sums, columns, width), strict=True):
        module.spread(panel, start, order.argsort(), 50, out)
    torch.testing.assert_close(out, x[:, order].T @ x[:, order] / 50, rtol=1e-4, atol=1e-4)
    assert torch.equal(out, out.T)
