import pytest
import torch

from hasten.accel.compression.quantizers import grid
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.grid import Grid, find_grid


def loss(weight, scheme, dtype=torch.float32):
    """Squared error of weight (R, C), relative, after the search of GPTQ."""
    quantized = Grid.of(weight.to(dtype), scheme, 24, 0.4).quantize(weight.to(dtype))
    return float((weight - quantized.dequantize().float()).square().sum() / weight.square().sum())


def clipped(weight, scheme):
    """Least relative squared error over a fine search of the magnitude at which a row (1, C) is clipped."""
    peak, errors = float(weight.abs().max()), []
    for factor in torch.logspace(-2.5, 0, 400).tolist():
        low, high = weight.amin().clamp(min=-factor * peak), weight.amax().clamp(max=factor * peak)
        for sign in (1, -1):
            scale, zero = scheme.of_range(low[None, None], high[None, None], torch.float32, sign)
            errors.append(float(grid._loss(weight[None], scale, zero, scheme)))
            if not scheme.symmetric:
                break
    return min(errors) / float(weight.square().sum())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("outlier", [0.0, 8.0, 20.0, 60.0])
@pytest.mark.parametrize("columns", [576, 4096])
def test_the_range_of_a_row_with_an_outlier_is_near_the_best(columns, outlier, bits, symmetric):
    weight = torch.randn(1, columns, generator=torch.Generator().manual_seed(0))
    if outlier:
        weight[0, 17] = outlier
    scheme = Scheme(bits, -1, symmetric)
    assert loss(weight, scheme) < 1.05 * clipped(weight, scheme)


def test_one_weight_of_20_sigma_does_not_cost_a_row_its_other_weights():
    weight = torch.randn(16, 2048, generator=torch.Generator().manual_seed(0))
    weight[:, 5] = 20.0
    for symmetric in (False, True):
        assert loss(weight, Scheme(2, -1, symmetric)) < 0.3  # with ranges of 0.4 and more: 0.6


@pytest.mark.parametrize("scheme", [Scheme(bits, 128, symmetric) for bits in (2, 4, 8) for symmetric in (False, True)])
def test_groups_without_outliers_get_the_ranges_of_the_plain_search(scheme, monkeypatch):
    weight = (torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    scale, zero = find_grid(weight, scheme, 24, 0.4)
    monkeypatch.setattr(grid, "_search_below", lambda *_: None)
    plain = find_grid(weight, scheme, 24, 0.4)
    assert torch.equal(scale, plain[0])
    assert torch.equal(zero, plain[1])


def test_a_group_does_not_depend_on_other_groups():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    weight[3, 200] = 30.0
    scheme = Scheme(2, 64)
    together, alone = find_grid(weight, scheme, 24, 0.4), find_grid(weight[3:4], scheme, 24, 0.4)
    assert torch.equal(together[0][3:4], alone[0])
    assert torch.equal(together[1][3:4], alone[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_groups_of_zeros_keep_a_scale_above_zero(dtype):
    scale, _ = find_grid(torch.zeros(2, 64, dtype=dtype), Scheme(2, 32), 24, 0.4)
    assert bool((scale > 0).all())


def test_scales_below_the_normal_numbers_of_float16_are_kept():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 1e-5
    scheme = Scheme(4, 64)
    assert float(find_grid(weight.half(), scheme)[0].max()) < 6e-5
    assert loss(weight.half().float(), scheme, torch.float16) < 1.2 * loss(weight.half().float(), scheme)
