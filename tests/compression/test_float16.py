"""Weights near both ends of float16's range."""

import pytest
import torch

from tests.compression.methods import SOLVES, hessian_of, inputs_of, solved, weight_of


@pytest.mark.parametrize("size", [2e-6, 1e-4, 1.0, 3e4])
@pytest.mark.parametrize(("path", "name"), SOLVES)
def test_float16_is_as_good_as_float32(path, name, size):
    weight = weight_of(torch.float16, size).clamp(-65504, 65504)
    errors = []
    for dtype in (torch.float16, torch.float32):
        result, stored = solved(path, name, weight.to(dtype), hessian_of(inputs_of()))
        assert bool(torch.isfinite(stored).all())
        errors.append(float(result.error.sum() / result.power.sum()))
    # The step between subnormal numbers is 6e-8, which is 3 % of the smallest weights here.
    assert errors[0] < 1.15 * errors[1] + 1e-3


@pytest.mark.parametrize(("path", "name"), SOLVES)
def test_the_largest_numbers_of_float16_stay_finite(path, name):
    weight = weight_of(torch.float16, 1.0)
    weight[:, ::7] = 65504 * weight[:, ::7].sign()
    result, stored = solved(path, name, weight, hessian_of(inputs_of()))
    assert bool(torch.isfinite(stored).all())
    assert bool(torch.isfinite(result.error).all())
    assert float(result.error.sum() / result.power.sum()) < 0.6
