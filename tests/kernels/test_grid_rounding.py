"""Rounding to the values of a grid, by C that is compiled here, and by torch."""

import pytest
import torch

from hasten.kernels import grid_rounding
from hasten.kernels.grid_rounding import Points, c_kernel, reference
from hasten.kernels.grid_rounding.reference import E2M1, E4M3, codes_of, values_of

POINTS = [Points("int", bits) for bits in (2, 3, 4, 8)] + [Points("float", 8), Points("float", 4)]
SIZES = [1, 7, 16, 33, 128]
INPUTS = [("int", 8, -128.0, 127.0), ("int", 4, -8.0, 7.0), ("float", 8, -448.0, 448.0), ("float", 4, -6.0, 6.0)]


def weights(points, size):
    """Groups with their scales and zero points: of zeros, of a single outlier, and clipped ones."""
    generator = torch.Generator().manual_seed(size)
    groups = torch.randn(6, 5, size, generator=generator)
    groups[0, 0], groups[1, 1, 0] = 0.0, 40.0
    scale = groups.abs().amax(-1).clamp(min=1e-30) / points.top
    scale[2:] *= 0.7
    # Floats do not read theirs.
    zero = torch.randint(0, int(points.top), scale.shape, generator=generator).float()
    return groups, scale, zero


def check_weights(module, points, size):
    groups, scale, zero = weights(points, size)
    codes = reference.encode(groups, scale, zero, points)
    assert torch.equal(module.encode(groups, scale, zero, points), codes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(
            module.decode(codes, scale, zero, points, dtype), reference.decode(codes, scale, zero, points, dtype)
        )
    exact = (reference.decode(codes, scale, zero, points, torch.float32).double() - groups).square().sum(-1)
    torch.testing.assert_close(module.losses(groups, scale, zero, points).double(), exact, rtol=1e-5, atol=1e-12)


def check_inputs(module, dtype, kind, bits, low, high):
    generator = torch.Generator().manual_seed(bits)
    for size in SIZES:
        x = (3 * torch.randn(4, 5, size, generator=generator)).to(dtype)
        x[0, 0], x[1, 1, 0], x[2, 2, 0] = 0.0, torch.nan, torch.inf
        largest = reference.absmax(x)
        torch.testing.assert_close(module.absmax(x), largest, rtol=0, atol=0, equal_nan=True)
        for scale in (largest / high, (largest.float() / high), largest[:1, :1] / high):
            scale = scale.masked_fill(scale == 0, 1.0)
            given = x, scale, kind, bits, low, high
            rounded, expected = module.round_scaled(*given), reference.round_scaled(*given)
            torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)
            numbers = ~expected.isnan()
            assert torch.equal(rounded.signbit()[numbers], expected.signbit()[numbers])


@pytest.mark.parametrize("points", POINTS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_rounds_weights_as_torch_does(points, size):
    check_weights(grid_rounding, points, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_the_kernel_rounds_inputs_as_torch_does(dtype, given):
    check_inputs(grid_rounding, dtype, *given)


def test_the_kernel_is_right_with_fewer_instructions(with_fewer_instructions):
    with_fewer_instructions(c_kernel)
    for points in POINTS:
        check_weights(c_kernel, points, 33)
    for given in INPUTS:
        check_inputs(c_kernel, torch.bfloat16, *given)


def test_threads_change_no_result():
    groups, scale, zero = weights(Points("int", 4), 33)
    before = torch.get_num_threads()
    one = grid_rounding.losses(groups, scale, zero, Points("int", 4))
    torch.set_num_threads(2)
    try:
        assert torch.equal(grid_rounding.losses(groups, scale, zero, Points("int", 4)), one)
    finally:
        torch.set_num_threads(before)


def test_rounding_of_all_numbers_of_sixteen_bits_is_that_of_a_cast():
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.float().abs() <= 448].view(1, -1)
    rounded = grid_rounding.round_scaled(x, torch.ones(1, 1, dtype=x.dtype), "float", 8, -448.0, 448.0)
    assert torch.equal(rounded, x.to(E4M3).to(x.dtype))
    codes = grid_rounding.encode(x.float()[None], torch.ones(1, 1), None, Points("float", 8))
    expected = x.to(E4M3).view(torch.uint8)
    # Codes have no negative zero.
    assert torch.equal(codes[0], expected.masked_fill(expected == 0x80, 0))


def test_the_codes_of_e2m1_are_sign_and_magnitude():
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    assert codes_of(values, 4).tolist() == [*range(8), 0, *range(9, 16)]
    assert torch.equal(values_of(torch.arange(16, dtype=torch.uint8), None, Points("float", 4)), values)
