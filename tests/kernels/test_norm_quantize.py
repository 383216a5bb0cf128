"""RMS norm with residual and codes."""

import pytest
import torch

from hasten.kernels.norm_quantize import norm_quantize


def test_a_row_of_equal_numbers_is_normed_to_one_and_coded_as_the_largest_code():
    x, weight = torch.full((1, 4), 3.0), torch.tensor([1.0, -1.0, 0.5, 0.0])
    plain = norm_quantize(x, weight, 0.0)
    assert plain.values.tolist() == [[1.0, -1.0, 0.5, 0.0]]
    assert plain.scale is None
    assert plain.residual is None
    found = norm_quantize(x, weight, 0.0, residual=x, dtype=torch.int8)
    assert found.values.tolist() == [[127, -127, 64, 0]]
    assert found.residual.tolist() == [[6.0] * 4]
    torch.testing.assert_close(found.scale, torch.tensor([[1 / 127]]))


def test_a_row_of_zeros_stays_zero():
    found = norm_quantize(torch.zeros(1, 4), torch.ones(4), 1e-6, dtype=torch.float8_e4m3fn)
    assert found.values.float().tolist() == [[0.0] * 4]


def test_other_types_of_codes_are_refused():
    with pytest.raises(ValueError, match=r"dtype=torch\.int32 is not supported: use None or one of torch\.int8"):
        norm_quantize(torch.ones(1, 4), torch.ones(4), 1e-6, dtype=torch.int32)
