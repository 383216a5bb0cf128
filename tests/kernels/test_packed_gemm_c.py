"""Products with packed weights by C that is compiled here, for each length of vectors."""

import platform
from functools import cache

import pytest
import torch

from hasten.kernels import compiled
from hasten.kernels.packed_gemm import c_kernel, dequantized_rows, packed_gemm, prepare
from hasten.kernels.packed_gemm.c_kernel import SOURCE
from hasten.kernels.packed_gemm.panels import Panels
from hasten.kernels.packed_gemm.reference import dequantize
from hasten.kernels.packed_weight import BITS, PackedWeight, pack_codes

# Rows, columns and groups: groups of 32, 64 and 128, of whole rows, of several sums, and some that are padded.
SHAPES = [(64, 96, 3), (130, 192, 3), (1, 256, 2), (65, 640, 1), (70, 65, 1), (33, 120, 3)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 70]
X86 = platform.machine() in ("x86_64", "AMD64")
# What is switched off of the processor's instructions: vectors of up to 64, 32 and 16 bytes.
WITHOUT = ["", "-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-fma"]


@cache
def function_without(options):
    library = compiled.load_library.__wrapped__(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c_kernel, "load_library", lambda source: library)
        return c_kernel._function.__wrapped__()


@pytest.fixture(params=WITHOUT if X86 else [""], ids=lambda options: options or "native")
def kernel(request, monkeypatch):
    """The kernel, compiled for vectors of one length."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CC", f"cc {request.param}")
        function = function_without(request.param)
    if function is None:
        pytest.skip(f"there is no C compiler that knows {request.param}")
    monkeypatch.setattr(c_kernel, "_function", lambda: function)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def packed(rows, columns, groups, bits, symmetric, permuted=False):
    generator = torch.Generator().manual_seed(rows * columns + bits)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    # A float32 scale that bfloat16 does not hold, or one that it does.
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero_point = None if symmetric else torch.randint(2**bits, (rows, groups), generator=generator).to(torch.uint8)
    order = torch.randperm(columns, generator=generator)
    index = torch.arange(groups).repeat_interleave(columns // groups)[order].int() if permuted else None
    return PackedWeight(
        pack_codes(codes, bits), scale.bfloat16() if symmetric else scale, columns, bits, zero_point, index
    )


def inputs(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_products_of_all_shapes_equal_those_of_the_dequantized_weight(kernel, bits, symmetric, monkeypatch):
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: allocate(*shape, **options).fill_(torch.nan))
    for shape in SHAPES:
        weight, x = packed(*shape, bits, symmetric), inputs(70, shape[1])
        panels, exact = prepare(weight), dequantize(weight, torch.float64)
        assert isinstance(panels, Panels)
        sizes = x.double().abs() @ (exact.abs() + weight.scale.double().amax()).T
        for rows in ROWS:
            product = packed_gemm(x[:rows], panels)
            assert product.shape == (rows, shape[0])
            # Roundings of sums of up to 640 products; zero points are subtracted from sums, not from codes.
            error = (product - x[:rows].double() @ exact.T).abs()
            assert (error <= 2**-20 * sizes[:rows]).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_a_row_has_the_same_product_to_the_bit_among_any_others_and_on_any_threads(kernel, bits, symmetric, threads):
    panels, x = prepare(packed(192, 384, 3, bits, symmetric)), inputs(400, 384)
    threads(1)
    whole = packed_gemm(x, panels)
    for rows in [*range(1, 15), 187, 399]:
        assert torch.equal(packed_gemm(x[:rows], panels), whole[:rows])
        assert torch.equal(packed_gemm(x[-rows:], panels), whole[-rows:])
    threads(2)
    assert torch.equal(packed_gemm(x, panels), whole)


@pytest.mark.parametrize("bits", BITS)
def test_columns_in_activation_order_are_those_of_their_groups(bits):
    weight, x = packed(70, 96, 3, bits, symmetric=False, permuted=True), inputs(4, 96)
    panels = prepare(weight)
    exact = dequantize(weight, torch.float64)
    torch.testing.assert_close(packed_gemm(x, panels).double(), x.double() @ exact.T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(dequantized_rows(torch.tensor([69, 3]), panels), exact[[69, 3]].float())


def test_unequal_groups_of_columns_stay_as_they_are():
    index = torch.tensor([0] * 5 + [1] * 3).int()
    weight = PackedWeight(pack_codes(torch.ones(2, 8), 4), torch.ones(2, 2), 8, 4, None, index)
    assert prepare(weight) is weight
    assert packed_gemm(torch.ones(1, 8), weight).tolist() == [[-56.0, -56.0]]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_dequantized_alone(bits, symmetric):
    index = torch.tensor([[3, 129], [64, 3]]).flatten()
    for shape in SHAPES[1], (130, 65, 1):
        weight = packed(*shape, bits, symmetric)
        expected = dequantize(weight)[index]
        for form in weight, prepare(weight):
            torch.testing.assert_close(dequantized_rows(index, form), expected, rtol=1e-6, atol=0)


def test_panels_are_as_large_as_the_packed_weight():
    for bits in BITS:
        weight = packed(192, 384, 3, bits, symmetric=True)
        assert prepare(weight).nbytes == weight.nbytes


def test_the_product_of_bfloat16_rows_is_bfloat16():
    weight, x = packed(64, 96, 3, 4, symmetric=True), inputs(3, 96).bfloat16()
    assert torch.equal(packed_gemm(x, prepare(weight)), packed_gemm(x.float(), prepare(weight)).bfloat16())
