"""The norm of rows in C."""

import pytest
import torch

from hasten.kernels.rms_norm import c_kernel, reference, rms_norm

pytestmark = pytest.mark.skipif(not c_kernel.is_available(), reason="there is no C compiler")


@pytest.mark.parametrize("shape", [(1, 576), (3, 64), (2, 1), (5, 100), (2, 3, 257), (0, 8)])
def test_it_equals_the_reference_in_float64(shape):
    generator = torch.Generator().manual_seed(shape[-1])
    x, weight = torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(c_kernel.rms_norm(x, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-6)
    ours = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    torch.testing.assert_close(expected, ours, rtol=1e-9, atol=1e-9)


def test_a_row_is_the_same_to_the_bit_alone_and_among_others():
    x, weight = torch.randn(7, 577), torch.randn(577)
    together = rms_norm(x, weight, 1e-6)
    assert all(torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row]) for row in range(7))


def test_a_view_whose_rows_are_apart_is_normalised_too():
    x, weight = torch.randn(4, 6, 32), torch.randn(32)
    torch.testing.assert_close(rms_norm(x[:, 1:3], weight, 1e-5), rms_norm(x[:, 1:3].contiguous(), weight, 1e-5))


def test_zeros_stay_zeros():
    assert not rms_norm(torch.zeros(2, 16), torch.ones(16), 1e-6).any()
