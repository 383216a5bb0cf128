import torch

from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest


def test_a_group_worked_by_hand():
    # Range -1 … 2 in 3 steps of 1: zero point 1; 0.4 is nearer to 0, 0.6 to 1. In a group of 8, the rest is zero.
    weight = torch.tensor([[-1.0, 2.0, 0.4, 0.6, 0.0, 0.0, 0.0, 0.0]])
    result = RoundToNearest().quantize(weight, None, Scheme(bits=2, group_size=8))
    assert result.weight.codes.tolist() == [[0, 3, 1, 2, 1, 1, 1, 1]]
    assert result.weight.scale.tolist() == [[1.0]]
    assert result.weight.zero_point.tolist() == [[1]]
    torch.testing.assert_close(result.error, torch.tensor([0.16 + 0.16]))


def test_no_code_is_nearer_than_the_one_chosen(weight):
    scheme = Scheme(3, 32)
    quantized = RoundToNearest().quantize(weight, None, scheme).weight
    scale = quantized.scale.float().repeat_interleave(32, 1)
    zero = quantized.zero_point.float().repeat_interleave(32, 1)
    every = torch.arange(8.0)[:, None, None]
    best = ((every - zero) * scale - weight.float()).abs().amin(0)
    chosen = ((quantized.codes.float() - zero) * scale - weight.float()).abs()
    torch.testing.assert_close(chosen, best)


def test_searched_scales_make_less_squared_error(weight):
    scheme = Scheme(2, 32)
    full = RoundToNearest().quantize(weight, None, scheme)
    searched = RoundToNearest(search=20).quantize(weight, None, scheme)
    assert float(searched.error.sum()) < 0.9 * float(full.error.sum())
    assert bool((searched.error <= full.error * 1.0001).all())
