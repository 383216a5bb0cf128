"""Dequantization of unpacked codes."""

import torch

from hasten.kernels.dequantize import dequantize


def test_a_code_at_its_zero_point_is_zero():
    codes = torch.tensor([[3, 5, 0, 7]], dtype=torch.uint8)
    scale, zero_point = torch.tensor([[0.5, 2.0]]), torch.tensor([[3, 7]], dtype=torch.uint8)
    assert dequantize(codes, scale, zero_point).tolist() == [[0.0, 1.0, -14.0, 0.0]]
