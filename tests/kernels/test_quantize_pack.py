"""Quantization to packed words."""

import pytest
import torch

from hasten.kernels.quantize_pack import quantize_pack, unpack_dequantize


def test_values_on_the_grid_come_back_exactly():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 12.0, 14.0, 16.0]])
    packed = quantize_pack(x, 2, "token")
    assert packed.words.tolist() == [[0b11100100], [0b11100100]]
    assert packed.scale.tolist() == [[1.0], [2.0]]
    assert packed.offset.tolist() == [[0.0], [10.0]]
    assert torch.equal(unpack_dequantize(packed), x)
    keys = quantize_pack(x.T.contiguous(), 2, "channel")
    assert keys.scale.tolist() == [[1.0, 2.0]]
    assert torch.equal(unpack_dequantize(keys), x.T)


def test_symmetric_codes_have_their_zero_in_the_middle():
    packed = quantize_pack(torch.tensor([[-7.5, 0.0, 7.0]]), 4, "token", symmetric=True)
    assert packed.offset is None
    assert packed.words.tolist() == [[0xF80]]
    assert unpack_dequantize(packed).tolist() == [[-8.0, 0.0, 7.0]]
    assert packed.nbytes == 8


def test_an_outlier_channel_costs_the_others_nothing():
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100
    others = torch.arange(64) != 5
    error = {
        axis: float((unpack_dequantize(quantize_pack(x, 4, axis, 32)) - x)[:, others].square().mean())
        for axis in ("channel", "token")
    }
    assert error["channel"] < 0.02 < error["token"]


def test_groups_that_cannot_be_packed_are_refused():
    x = torch.ones(6, 96)
    for arguments, message in (
        ((5, "token"), "bits=5 is not supported: use one of 2, 3, 4, 8"),
        ((4, "row"), "axis='row' is not supported: use one of token, channel"),
        ((4, "channel", 4), "group_size=4 must divide the 6 rows"),
        ((4, "token", 48), "group_size=48 must be a multiple of 32 or the whole row of 96"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_pack(x, *arguments)
