"""Methods that visit columns in blocks, over widths, group sizes and patterns that the blocks do not fit."""

from dataclasses import replace

import pytest
import torch

from hasten.accel.compression.calibration.factor import ORDERS
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.pruners.base import Sparsity
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.pruners.n_of_m import NOfM
from hasten.accel.compression.pruners.sparsegpt import SparseGPT
from hasten.accel.compression.quantizers.baq import ColumnwiseBAQ
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.columns import ColumnBits
from hasten.accel.compression.quantizers.gptq import GPTQ
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest

# Widths of real models that 128 does not divide, one below the block, and one beyond several blocks.
WIDTHS = (40, 72, 96, 200, 288, 576, 896)
ROWS = 12


def group_sizes(columns):
    """Every group size that the columns allow, and one scale a row."""
    return [*(size for size in range(8, columns + 1) if columns % size == 0), -1]


def layer(columns):
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = Hessian(columns)
    hessian.add(inputs * torch.logspace(-1, 1, columns))
    return (torch.randn(ROWS, columns, generator=generator) * 0.05).bfloat16(), hessian


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_gptq_is_better_than_rounding_for_every_group_size(columns, order, symmetric):
    weight, hessian = layer(columns)
    gptq, nearest = GPTQ(act_order=order, refits=1), RoundToNearest(search=24, shrink=0.4)
    prepared = gptq.prepare(hessian)
    for size in group_sizes(columns):
        scheme = Scheme(3, size, symmetric)
        error = float(gptq.quantize(weight, prepared, scheme).error.sum())
        rounded = float(nearest.quantize(weight, nearest.prepare(hessian), scheme).error.sum())
        assert error < rounded, f"groups of {size}"


@pytest.mark.parametrize("columns", WIDTHS)
def test_groups_of_the_columns_as_they_come_do_not_depend_on_the_blocks(columns, monkeypatch):
    weight, hessian = layer(columns)
    quantizer = GPTQ(act_order="none", refits=0)
    prepared = quantizer.prepare(hessian)
    for size in group_sizes(columns)[:-1]:
        scheme = Scheme(3, size)
        blocked = quantizer.quantize(weight.float(), prepared, scheme).weight
        with monkeypatch.context() as patch:
            # One block of all columns, visited one by one.
            patch.setattr("hasten.accel.compression.quantizers.gptq._BLOCK", columns)
            patch.setattr("hasten.kernels.nearest_plane.reference._INNER", columns)
            whole = quantizer.quantize(weight.float(), prepared, scheme).weight
        # Sums in another order: a value halfway between two codes may be rounded either way, which changes its row.
        assert float((blocked.codes != whole.codes).float().mean()) < 0.05, f"groups of {size}"


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    "pattern", [NOfM(2, 4), NOfM(4, 8), NOfM(1, 2), Sparsity(0.5)], ids=["2:4", "4:8", "1:2", "50 %"]
)
def test_sparsegpt_is_better_than_magnitude_at_every_width(columns, pattern):
    weight, hessian = layer(columns)
    methods = SparseGPT(), Magnitude()
    errors = [float(one.prune(weight, one.prepare(hessian), pattern).error.sum()) for one in methods]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("block", [1, 5, 24, 33, 48, 200])
def test_sparsegpt_prunes_the_same_share_for_every_block(block):
    weight, hessian = layer(288)
    method = replace(SparseGPT(), block=block)
    result = method.prune(weight, method.prepare(hessian), Sparsity(0.5))
    assert bool((result.weight.mask.sum(1) == 144).all())
    magnitude = Magnitude()
    rounded = magnitude.prune(weight, magnitude.prepare(hessian), Sparsity(0.5))
    assert float(result.error.sum()) < float(rounded.error.sum())


def test_a_pattern_that_does_not_divide_the_columns_is_refused():
    with pytest.raises(ValueError, match="m=4 does not divide the 6 columns"):
        NOfM(2, 4).lowest(torch.ones(2, 6))


@pytest.mark.parametrize("columns", WIDTHS)
def test_baq_over_columns_is_better_than_equal_bits_at_every_width(columns):
    weight, hessian = layer(columns)
    method, nearest = ColumnwiseBAQ(), RoundToNearest(search=24, shrink=0.4)
    error = float(method.quantize(weight, method.prepare(hessian), ColumnBits(3)).error.sum())
    assert error < float(nearest.quantize(weight, nearest.prepare(hessian), Scheme(3, -1, True)).error.sum())
