"""Facts of the float grids, worked by hand or by brute force, and GPTQ on each of them."""

import pytest
import torch

from hasten.accel.compression.levels.level import level_kinds, parse_level
from hasten.accel.compression.quantizers.floats import FloatScheme
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.grid import Grid, find_grid
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.models.architecture import Layer
from tests.compression.trained import target_hessians, target_model

NVFP4 = FloatScheme(4, "tensor_group", 16, "fp8")
MXFP4 = FloatScheme(4, "group", 32, "power_of_two")
BLOCK = FloatScheme(8, "block", 128)
LEVELS = [name for kind in level_kinds() for name in kind.examples if getattr(parse_level(name), "grid", None)]
ZERO = torch.zeros(())


def test_ties_of_e2m1_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    scheme = FloatScheme(4, "group", 32, "power_of_two")
    assert torch.equal(scheme.nearest(ties.clone(), ZERO), expected)
    assert torch.equal(scheme.nearest(-ties, ZERO), -expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_of_the_grid_is_nearer_than_the_one_that_is_chosen(bits):
    scheme = FloatScheme(bits)
    codes = torch.arange(16 if bits == 4 else 256, dtype=torch.uint8)
    grid = scheme.values(codes, ZERO)
    grid = grid[grid.isfinite()]
    values = torch.cat(
        [torch.randn(2000, generator=torch.Generator().manual_seed(0)) * scale for scale in (1e-3, 1, 300)]
    )
    found = torch.empty(len(values), dtype=torch.uint8)
    nearest = scheme.encode(values.clone(), ZERO, found)
    assert torch.equal((nearest - values).abs(), (grid[:, None] - values).abs().amin(0))
    assert torch.equal(scheme.values(found, ZERO), nearest)


def test_values_beyond_the_largest_float_become_that():
    assert FloatScheme(8).nearest(torch.tensor([449.0, 1e6, -1e6]), ZERO).tolist() == [448.0, 448.0, -448.0]
    assert FloatScheme(4).nearest(torch.tensor([1e6, -7.0]), ZERO).tolist() == [6.0, -6.0]


def test_the_two_scales_of_nvfp4_on_a_group_worked_by_hand():
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([6.0, 3.0, 0.9])
    weight[0, 16:19] = torch.tensor([0.6, -0.31, 0.05])
    grid = Grid.of(weight, NVFP4)
    # The first group has the largest weight, and so the largest FP8 scale: 6 / 6 * g = 448 with g = 448 * 6 / 6.
    assert grid.scheme.layers_scale == 448.0
    # The second: 0.6 / 6 * 448 = 44.8, between the FP8 numbers 44 and 48.
    assert grid.scale.float().tolist() == [[448.0, 44.0]]
    found = grid.quantize(weight).dequantize().float()
    step = 44 / 448
    # 0.6 / step = 6.1, -0.31 / step = -3.16 and 0.05 / step = 0.51 go to 6, -3 and 0.5; 0.9 goes to 1.
    expected = torch.tensor([6.0, 3.0, 1.0, 6 * step, -3 * step, 0.5 * step]).bfloat16().float()
    assert torch.equal(torch.cat([found[0, :3], found[0, 16:19]]), expected)


@pytest.mark.parametrize("peak", [0.11, 0.87, 1.0, 1.74, 1.76, 5.9])
def test_the_scale_of_a_microscaling_group_is_the_power_of_two_that_clips_least(peak):
    weight = torch.linspace(-peak, peak, 32)[None]
    scale, _ = find_grid(weight, MXFP4)
    assert scale.dtype == torch.float8_e8m0fnu
    found = float(scale.float())
    assert found == 2.0 ** round(torch.tensor(found).log2().item())
    # The largest value is 6: the group's largest magnitude is at least half of that, and beyond it by a sixth at most.
    assert 3.5 <= peak / found < 7


def test_a_block_has_one_scale_and_the_last_block_the_rows_that_are_left():
    weight = torch.randn(160, 256, generator=torch.Generator().manual_seed(0))
    weight[5, 200], weight[150, 7] = 89.6, -44.8
    scale, _ = find_grid(weight, BLOCK)
    assert scale.shape == (160, 2)
    for rows in (slice(0, 128), slice(128, 160)):
        assert len(scale[rows, 0].unique()) == len(scale[rows, 1].unique()) == 1
    assert float(scale[0, 1]) == pytest.approx(0.2)
    assert float(scale[159, 0]) == pytest.approx(0.1)


def test_layers_of_a_group_share_the_scale_that_servers_know_once():
    generator = torch.Generator().manual_seed(0)
    weights = {"gate": torch.randn(16, 64, generator=generator), "up": 3 * torch.randn(32, 64, generator=generator)}
    layers = [Layer(name, name, len(weight), 64, "gate", None) for name, weight in weights.items()]
    peak = max(float(weight.abs().max()) for weight in weights.values())
    for name, part in (("nvfp4", "weight_global_scale"), ("fp8_static", "weight_scale")):
        level = parse_level(name)
        found = level.solve(RoundToNearest(), layers, lambda layer: weights[layer.name], None, "cpu")
        scales = {name: float(level.pack(result.weight)[part]) for name, result in found.items()}
        assert scales["gate"] == scales["up"] == pytest.approx(2688 / peak if name == "nvfp4" else peak / 448)


def test_a_search_makes_less_error_on_every_grid_whose_scales_it_may_change():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for name in LEVELS:
        level = parse_level(name)
        full, searched = (
            float(RoundToNearest(search=search, shrink=0.4).quantize(weight, None, level.grid).error.sum())
            for search in (0, 24)
        )
        assert searched <= full, name
        if name in ("nvfp4", "mxfp4", "fp8", "fp8_block"):
            assert searched < full, name


def test_rounding_to_nearest_searches_floats_by_itself_and_integers_not():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for name in LEVELS:
        grid = parse_level(name).grid
        plain, usual = (RoundToNearest(**options).quantize(weight, None, grid) for options in ({"search": 0}, {}))
        # A scale of all layers is not searched, and powers of two make no difference to e4m3.
        searches = grid.kind == "float" and grid.strategy != "tensor" and not name.startswith("mxfp8")
        assert bool((usual.error <= plain.error).all()) or grid.block_rows > 1, name
        assert (float(usual.error.sum()) < float(plain.error.sum())) == searches, name


def test_the_scales_of_nvfp4_that_are_tried_make_nearly_the_least_error_of_all_e4m3_scales():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    grid = NVFP4.bound(weight)
    groups = weight.unflatten(1, (-1, 16))
    scales = grid.scales(torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn))[:, None, None, None]
    errors = (grid.nearest(groups / scales, ZERO) * scales - groups).square().sum(-1)
    found, plain = (find_grid(weight, grid, search)[0].float().div(grid.layers_scale) for search in (1, 0))
    error, full = (
        float((grid.nearest(groups / scale[..., None], ZERO) * scale[..., None] - groups).square().sum())
        for scale in (found, plain)
    )
    least = float(errors.amin(0).sum())
    assert least <= error < 1.01 * least < 0.8 * full


def test_scales_that_differ_by_a_power_of_two_round_alike_in_e4m3():
    # So a search of one octave sees all that scales can do to the weights, but for those that are nearly zero.
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    scheme = FloatScheme(8)
    assert torch.equal(scheme.nearest(64 * values, ZERO) / 64, scheme.nearest(32 * values, ZERO) / 32)


@pytest.mark.parametrize("name", LEVELS)
def test_gptq_beats_rounding_on_every_grid_of_the_embedded_target(name):
    level, model = parse_level(name), target_model()
    layer = model.linears(0)[0]
    hessian = target_hessians("train", 8)[layer.name]
    weight = model.checkpoint.tensor(f"{layer.name}.weight")
    errors = {}
    for method in (GPTQ(), RoundToNearest()):
        result = method.quantize(weight, method.prepare(hessian), level.grid)
        errors[type(method)] = float(result.error.sum())
        assert torch.equal(level.unpack(level.pack(result.weight)), result.weight.dequantize())
    assert errors[GPTQ] < 0.8 * errors[RoundToNearest]
