"""Gated activation with codes."""

import pytest
import torch

from hasten.kernels.gated_activation import gated_activation


def test_the_first_half_is_the_gate():
    x = torch.tensor([[0.0, 20.0, 5.0, 3.0]])
    values, scale = gated_activation(x)
    torch.testing.assert_close(values, torch.tensor([[0.0, 60.0]]))
    assert scale is None
    codes, scale = gated_activation(x, "gelu_tanh", torch.int8)
    assert codes.tolist() == [[0, 127]]
    torch.testing.assert_close(scale, torch.tensor([[60 / 127]]))


def test_other_activations_and_odd_widths_are_refused():
    with pytest.raises(ValueError, match="activation='relu' is not supported: use one of silu, gelu_tanh"):
        gated_activation(torch.ones(1, 4), "relu")
    with pytest.raises(ValueError, match="even number of columns, a gate and an up half, got 3"):
        gated_activation(torch.ones(1, 3))
