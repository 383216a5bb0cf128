"""Product of a few rows and a weight in bfloat16 panels, by C that is compiled here."""

import pytest
import torch

from hasten.kernels import compiled
from hasten.kernels.skinny_gemm import pack_weight, reference, skinny_gemm
from hasten.kernels.skinny_gemm.c_kernel import SOURCE

SIZES = [(1, 1), (31, 7), (32, 256), (33, 257), (100, 600)]
ROWS = [1, 2, 3, 5, 12, 13, 24, 25, 60]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if compiled.load_library(SOURCE) is None:
        pytest.skip("there is no C compiler")


def operands(outputs, inputs, rows):
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16().float()
    return weight, torch.randn(rows, inputs, generator=generator)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_kernel_equals_the_reference_and_that_the_plain_product(size, rows):
    weight, x = operands(*size, rows)
    packed = pack_weight(weight)
    product = skinny_gemm(x, packed, size[0])
    assert product.shape == (rows, size[0])
    # Sums of some hundred products of size one, in another order.
    torch.testing.assert_close(product, reference.skinny_gemm(x, packed, size[0]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(reference.skinny_gemm(x, packed, size[0]), x @ weight.T, atol=1e-4, rtol=1e-5)


def test_a_row_has_the_same_product_to_the_bit_among_any_others_and_on_any_threads(threads):
    weight, x = operands(96, 700, 40)
    packed = pack_weight(weight)
    threads(1)
    whole = skinny_gemm(x, packed, 96)
    for rows in range(1, 40):
        assert torch.equal(skinny_gemm(x[:rows], packed, 96), whole[:rows])
    threads(2)
    assert torch.equal(skinny_gemm(x, packed, 96), whole)


def test_rows_that_lie_apart_are_taken_together():
    weight, x = operands(64, 48, 6)
    packed = pack_weight(weight)
    assert torch.equal(skinny_gemm(x[::2], packed, 64), skinny_gemm(x[::2].clone(), packed, 64))


def test_only_what_bfloat16_holds_is_packed():
    weight, _ = operands(32, 32, 1)
    assert pack_weight(weight) is not None
    assert pack_weight(weight.bfloat16()) is None
    weight[3, 5] += 2**-20
    assert pack_weight(weight) is None
    assert pack_weight(torch.full((32, 32), torch.nan)) is None


def test_a_bfloat16_is_the_upper_half_of_a_word_or_the_lower_one():
    weight = torch.arange(64.0).bfloat16()[:, None]
    assert reference.pack_panels(weight)[1, 0, 3].tolist() == [35.0, 51.0]


def test_without_a_compiler_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert compiled.load_library.__wrapped__(SOURCE) is None
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert compiled.load_library.__wrapped__(SOURCE) is None


def test_it_is_compiled_once_and_where_nothing_may_be_kept_for_the_process(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    assert compiled.load_library.__wrapped__(SOURCE) is not None
    (library,) = (tmp_path / "kernels").iterdir()
    before = library.stat().st_mtime_ns
    assert compiled.load_library.__wrapped__(SOURCE) is not None
    assert library.stat().st_mtime_ns == before
    (tmp_path / "file").touch()
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    assert compiled.load_library.__wrapped__(SOURCE) is not None


def test_what_is_kept_is_for_one_kind_of_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    for flags in ("avx2", "avx2 avx512f"):
        monkeypatch.setattr(compiled, "_processor", lambda flags=flags: flags)
        assert compiled.load_library.__wrapped__(SOURCE) is not None
    assert len(list((tmp_path / "kernels").iterdir())) == 2
