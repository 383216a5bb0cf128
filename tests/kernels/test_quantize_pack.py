"""Quantization to packed words."""

import pytest
import torch

from hasten.kernels.packed_weight import BITS
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
    assert packed.nbytes == 4 + 2


def test_an_outlier_channel_costs_the_others_nothing():
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100
    others = torch.arange(64) != 5
    error = {
        axis: float((unpack_dequantize(quantize_pack(x, 4, axis, 32)) - x)[:, others].square().mean())
        for axis in ("channel", "token")
    }
    assert error["channel"] < 0.02 < error["token"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_values_with_a_large_mean_are_rounded_by_half_a_step_and_the_rounding_of_the_mean(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    mean = torch.tensor([-3000.0, -77.7, 0.01, 500.3])
    x = (mean + torch.randn(64, 4, generator=generator) * torch.tensor([20.0, 3.0, 1e-3, 30.0])).to(dtype)
    packed = quantize_pack(x, bits, "channel", 32)
    restored = unpack_dequantize(packed)
    assert restored.dtype == dtype
    low, high = (getattr(x.double().unflatten(0, (-1, 32)), name)(1) for name in ("amin", "amax"))
    half_a_step = (high - low) / (2 * (2**bits - 1))
    # 2^-11: of float16. That of a bfloat16 result is not the codes' doing.
    bound = half_a_step * (1 + 2**-10) + 2**-11 * low.abs() + torch.finfo(dtype).eps / 2 * high.abs()
    error = (restored.double() - x.double()).abs().unflatten(0, (-1, 32)).amax(1)
    assert bool((error <= bound).all()), (error, bound)
    # Most values are off by no more than half a step: a rounded offset does not shift them all.
    wrong = (restored.double() - x.double()).unflatten(0, (-1, 32)).mean(1).abs()
    assert dtype != torch.float32 or bool((wrong <= 0.5 * half_a_step).all())


def test_scales_and_offsets_stay_within_float16_for_every_dtype():
    x = torch.tensor([[1e6, -2e6, 0.0, 5.0], [1e-30, 0.0, 0.0, 0.0], [65_504.0, 65_504.0, 65_504.0, 65_504.0]])
    packed = quantize_pack(x, 4, "token")
    assert packed.scale.dtype == packed.offset.dtype == torch.float16
    assert packed.scale[1] == packed.scale[2] == torch.tensor(2.0).pow(-24)  # the least positive one
    assert packed.offset.tolist() == [[-65504.0], [0.0], [65504.0]]
    assert bool(unpack_dequantize(packed).isfinite().all())
    assert unpack_dequantize(packed)[1].tolist() == [0.0] * 4


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
