"""Pieces of the calibration pass: statistics of the inputs, and the solves of one layer by every method in conf."""

import pytest
import torch

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.calibration.slabs import SOLVE_BYTES, searched_weights, slab_of, slab_weights
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.levels.kinds.grid import GridLevel
from hasten.accel.compression.pruners.base import Sparsity
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits
from hasten.accel.compression.quantizers.grid import find_grid
from tests.gpu.catalogue import build, configs

pytestmark = pytest.mark.gpu

LEVELS = {
    "quantizer": [Scheme(3, 64), Scheme(4, -1, symmetric=True)],
    "column_quantizer": [ColumnBits(3.0)],
    "pruner": [Sparsity(0.5)],
}
CASES = [
    pytest.param(config, level, id=f"{config.stem}-{level}")
    for family, levels in LEVELS.items()
    for config in configs(family)
    for level in levels
]


def statistics(architecture, token_ids):
    """Hessians of the inputs of the first block, by group key."""
    groups = make_layer_groups(architecture, GridLevel(Scheme(8, -1)), (), 0, 0)[0]
    trees = Shard(architecture, {0: token_ids[:6], 1: token_ids[6:]}, batch=4).collect(
        architecture.load_block(0), groups
    )
    return {key: tree.total() for key, tree in trees.items()}


@pytest.fixture(scope="module")
def hessians(on_cpu, on_device, token_ids):
    return statistics(on_cpu, token_ids), statistics(on_device, token_ids)


@pytest.fixture(scope="module")
def layer(on_cpu, hessians):
    """Weight (R, C) of the layer with the most columns, and the Hessian of its input on the CPU."""
    layers = on_cpu.linears(0)
    widest = max(layers, key=lambda each: each.columns)
    return on_cpu.checkpoint.tensor(f"{widest.name}.weight"), hessians[0][widest.name]


def solve(method, level, weight, hessian):
    prepared = method.prepare(hessian)
    if isinstance(level, Sparsity):
        return method.prune(weight, prepared, level)
    return method.quantize(weight, prepared, level)


def restored(result):
    """Weight (R, C) float32 on the CPU that a result stands for."""
    weight = result.weight
    return (weight.dequantize() if hasattr(weight, "dequantize") else weight.weight).float().cpu()


def output_error(weight, changed, hessian):
    """Mean squared error of the layer's output, summed over rows, float64."""
    matrix = hessian.mean(torch.arange(weight.shape[1])).double()
    difference = (weight.float() - changed).double()
    return float(((difference @ matrix) * difference).sum())


def test_statistics_are_those_of_a_cpu(hessians):
    expected, found = hessians
    assert expected.keys() == found.keys()
    for key, hessian in expected.items():
        assert found[key].tokens == hessian.tokens == 12 * 128
        order = torch.arange(hessian.columns)
        matrix = hessian.mean(order)
        device = next(found[key].panels()).device
        difference = found[key].mean(order.to(device)).cpu() - matrix
        # float32 sums in another order, through half a block.
        assert difference.norm() < 1e-4 * matrix.norm(), key


def test_bfloat16_inputs_lose_nothing_in_the_products(device):
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    hessian = Hessian(300)
    hessian.add(x.to(device))
    matrix = hessian.mean(torch.arange(300, device=device)).cpu().double()
    # Products of bfloat16 values are exact in tf32 and in float32: what is left is the rounding of 64 additions.
    torch.testing.assert_close(matrix, x.double().T @ x.double() / 64, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("config", "level"), CASES)
def test_a_solve_is_as_good_as_on_a_cpu_and_repeats_to_the_bit(config, level, layer, device):
    weight, hessian = layer
    method = build(config)
    expected = solve(method, level, weight, hessian)
    results = [solve(method, level, weight.to(device), hessian.to(device)) for _ in range(2)]
    changed = restored(results[0])
    # A resumed run must write the same bytes.
    assert torch.equal(changed, restored(results[1]))
    error = output_error(weight, changed, hessian)
    # Rounding decides near ties, after which the columns to come differ, too; neither is better on average.
    assert error == pytest.approx(output_error(weight, restored(expected), hessian), rel=0.02)
    torch.testing.assert_close(results[0].error.sum().cpu(), expected.error.sum(), rtol=0.02, atol=0)
    torch.testing.assert_close(results[0].power.cpu(), expected.power, rtol=1e-3, atol=1e-6)
    assert results[0].weight.bits == expected.weight.bits
    assert results[0].notes == expected.notes


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_searched_grid_is_that_of_a_cpu(layer, device, symmetric):
    weight, _ = layer
    scheme = Scheme(3, 64, symmetric=symmetric)
    expected, found = find_grid(weight, scheme, 24, 0.4), find_grid(weight.to(device), scheme, 24, 0.4)
    # Of two ranges with all but equal loss either may win.
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu() == other).float().mean() > 0.99


def test_slabs_fit_the_device_and_depend_on_its_kind_alone(device):
    size = slab_of(device)
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
        assert size == slab_weights(memory)
        assert slab_weights() <= size <= memory / 8 / SOLVE_BYTES
        assert searched_weights(on_gpu=True) * 4 < memory / 8
    assert size & (size - 1) == 0
