"""Product of a few rows and a weight in bfloat16 panels, by C that is compiled here, for each length of vectors."""

import platform
import re
import subprocess
from functools import cache

import pytest
import torch

from hasten.kernels import compiled
from hasten.kernels.skinny_gemm import c_kernel, choice, pack_weight, reference, skinny_gemm
from hasten.kernels.skinny_gemm.c_kernel import SOURCE

SIZES = [(1, 1), (31, 7), (32, 256), (33, 257), (100, 600)]
ROWS = [1, 2, 3, 5, 6, 7, 12, 13, 14, 15, 24, 25, 60, 250]
X86 = platform.machine() in ("x86_64", "AMD64")
# What is switched off of the processor's instructions: vectors of up to 64, 32 and 16 bytes. The last does not multiply
# and add in one instruction.
WITHOUT = {"": "", "avx512": "-mno-avx512f", "avx2": "-mno-avx512f -mno-avx2", "fma": "-mno-avx512f -mno-avx2 -mno-fma"}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if compiled.load_library(SOURCE) is None:
        pytest.skip("there is no C compiler")


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setattr(choice, "is_faster", lambda: True)


@cache
def function_without(options):
    library = compiled.load_library.__wrapped__(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c_kernel, "load_library", lambda source: library)
        return c_kernel._function.__wrapped__()


@pytest.fixture(params=WITHOUT.values() if X86 else [""], ids=lambda options: options or "native")
def kernel(request, monkeypatch):
    """The kernel, compiled for vectors of one length."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CC", f"cc {request.param}")
        function = function_without(request.param)
    if function is None:
        pytest.skip(f"the compiler does not know {request.param}")
    monkeypatch.setattr(c_kernel, "_function", lambda: function)
    return request.param


def operands(outputs, inputs, rows):
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16().float()
    return weight, torch.randn(rows, inputs, generator=generator)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_kernel_equals_the_reference_and_that_the_plain_product(kernel, size, rows):
    weight, x = operands(*size, rows)
    packed = pack_weight(weight)
    product = skinny_gemm(x, packed, size[0])
    assert product.shape == (rows, size[0])
    exact = x.double() @ weight.double().T
    # Sums of up to 600 products of size one in float32.
    torch.testing.assert_close(product.double(), exact, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(reference.skinny_gemm(x, packed, size[0]).double(), exact, atol=1e-4, rtol=1e-5)


def test_a_row_has_the_same_product_to_the_bit_among_any_others_and_on_any_threads(kernel, threads):
    weight, x = operands(96, 700, 400)
    packed = pack_weight(weight)
    threads(1)
    whole = skinny_gemm(x, packed, 96)
    for rows in [*range(1, 40), 187, 399]:
        assert torch.equal(skinny_gemm(x[:rows], packed, 96), whole[:rows])
        assert torch.equal(skinny_gemm(x[-rows:], packed, 96), whole[-rows:])
    threads(2)
    assert torch.equal(skinny_gemm(x, packed, 96), whole)


@pytest.mark.skipif(not X86, reason="other processors have vectors of one length")
def test_vectors_of_every_length_give_the_same_bits_if_products_are_added_by_one_instruction(kernel):
    if "fma" in kernel:
        pytest.skip("rounds every product")
    weight, x = operands(64, 600, 9)
    slices = [torch.zeros(9, 64), *(part.double() for part in x.split(256, 1))]
    sums = slices[0]
    for part, columns in zip(slices[1:], weight.double().split(256, 1), strict=True):
        total = torch.zeros(9, 64)
        for k in range(part.shape[1]):
            # In float64 a product is exact, and its sum with a float32 is nearly so: one rounding to float32.
            total = (part[:, k, None] * columns[None, :, k] + total.double()).float()
        sums = sums + total
    # Two roundings, to float64 and float32, differ from one in about one of 2^29 additions.
    assert (skinny_gemm(x, pack_weight(weight), 64) == sums).float().mean() > 0.99


@pytest.mark.skipif(not X86, reason="reads x86 assembly")
def test_sums_stay_in_registers(kernel, tmp_path):
    assembly = tmp_path / "skinny_gemm.s"
    command = ["cc", *kernel.split(), *compiled._OPTIONS, "-S", str(SOURCE), "-o", str(assembly)]
    subprocess.run(command, check=True)
    # From a label to a jump back to it, with no other label between: an innermost loop.
    loops = re.findall(r"^(\.L\w+):\n((?:\t.*\n)*?)\tj\w+\t\1\n", assembly.read_text(), re.MULTILINE)
    bodies = [body for _, body in loops if "prefetch" in body]
    assert len(bodies) >= 4
    assert not [body for body in bodies if re.search(r"\(%r[sb]p\)", body)]


def test_rows_that_lie_apart_are_taken_together():
    weight, x = operands(64, 48, 6)
    packed = pack_weight(weight)
    assert torch.equal(skinny_gemm(x[::2], packed, 64), skinny_gemm(x[::2].clone(), packed, 64))


def test_nothing_is_packed_where_torch_is_faster(monkeypatch):
    weight, _ = operands(32, 32, 1)
    monkeypatch.setattr(choice, "is_faster", lambda: False)
    assert pack_weight(weight) is None


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
