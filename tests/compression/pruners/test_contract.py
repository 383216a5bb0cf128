"""The contract of every pruner in conf/pruner."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.pruners.base import Sparsity, lowest
from hasten.accel.compression.result import Result
from hasten.accel.errors import UserError
from tests.compression.pruners.conftest import COLUMNS, ROWS, hessian_of

CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "pruner").glob("*.yaml"))
FRACTIONS = [0.001, 0.3, 0.5, 0.77, 0.999]


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def pruner(request):
    return instantiate(OmegaConf.load(request.param))


@pytest.fixture(params=FRACTIONS)
def sparsity(request):
    return Sparsity(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_loses_exactly_its_number_of_weights_and_keeps_shape_and_dtype(
    pruner, sparsity, dtype, weight, hessian
):
    given = weight.to(dtype)
    pruned = pruner.prune(given, pruner.prepare(hessian), sparsity).weight
    assert pruned.weight.shape == pruned.mask.shape == (ROWS, COLUMNS)
    assert pruned.weight.dtype == dtype
    assert pruned.mask.dtype == torch.bool
    assert bool(((~pruned.mask).sum(1) == int(sparsity.fraction * COLUMNS)).all())
    assert bool((pruned.weight[~pruned.mask] == 0).all())
    assert bool((pruned.weight[pruned.mask] != 0).float().mean() > 0.99)
    assert bool(torch.isfinite(pruned.weight).all())
    assert torch.equal(given, weight.to(dtype))


def test_bits_are_a_mask_and_the_kept_weights_and_known_before(pruner, sparsity, weight, hessian):
    pruned = pruner.prune(weight, pruner.prepare(hessian), sparsity).weight
    assert pruned.bits == sparsity.stored_bits(ROWS, COLUMNS, 2)
    assert pruned.bits == ROWS * COLUMNS + ROWS * (COLUMNS - int(sparsity.fraction * COLUMNS)) * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_and_power_are_those_of_the_layers_output(pruner, dtype, weight, inputs, hessian):
    given = weight.to(dtype).float()
    result = pruner.prune(given.to(dtype), pruner.prepare(hessian), Sparsity(0.5))
    error = ((given - result.weight.weight.float()) @ inputs.T).square().mean(1)
    power = (given @ inputs.T).square().mean(1)
    # Sums of float32 in another order; correlated inputs make terms of both signs.
    torch.testing.assert_close(result.error, error, rtol=1e-3, atol=1e-4 * float(power.mean()))
    torch.testing.assert_close(result.power, power, rtol=1e-3, atol=0)


def test_more_sparsity_makes_more_error(pruner, weight, hessian):
    prepared = pruner.prepare(hessian)
    errors = [float(pruner.prune(weight, prepared, Sparsity(tenth / 10)).error.sum()) for tenth in range(1, 10)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 20


def test_a_row_does_not_see_the_rows_stacked_with_it(pruner, sparsity, weight, hessian):
    # Layers that share an input are stacked; matrix products of other shapes may round the last bit another way.
    prepared = pruner.prepare(hessian)
    together = pruner.prune(weight, prepared, sparsity).rows(16, 32)
    alone = pruner.prune(weight[16:32], prepared, sparsity)
    assert float((together.weight.mask != alone.weight.mask).float().mean()) < 0.01
    torch.testing.assert_close(together.error.sum(), alone.error.sum(), rtol=1e-2, atol=1e-6)


def test_cut_results_join_to_the_whole(pruner, weight, hessian):
    whole = pruner.prune(weight, pruner.prepare(hessian), Sparsity(0.5))
    joined = Result.join([whole.rows(0, 5), whole.rows(5, 40), whole.rows(40, ROWS)])
    assert torch.equal(joined.weight.weight, whole.weight.weight)
    assert torch.equal(joined.weight.mask, whole.weight.mask)
    assert torch.equal(joined.error, whole.error)
    assert torch.equal(joined.power, whole.power)


def test_the_same_input_gives_the_same_bits(pruner, sparsity, weight, hessian):
    first, second = (pruner.prune(weight, pruner.prepare(hessian), sparsity) for _ in range(2))
    assert torch.equal(first.weight.weight, second.weight.weight)
    assert torch.equal(first.weight.mask, second.weight.mask)
    assert torch.equal(first.error, second.error)


def test_a_weight_of_zeros_stays_zeros_and_has_as_many_pruned(pruner, sparsity, weight, hessian):
    result = pruner.prune(torch.zeros_like(weight), pruner.prepare(hessian), sparsity)
    assert not bool(result.weight.weight.any())
    assert result.weight.bits == sparsity.stored_bits(ROWS, COLUMNS, 2)
    assert not bool(result.error.any())


def test_inputs_that_are_always_zero_leave_finite_weights_that_make_no_error(pruner, weight, inputs):
    alive = torch.arange(COLUMNS) % 4 != 0
    prepared = pruner.prepare(hessian_of(inputs * alive))
    result = pruner.prune(weight, prepared, Sparsity(0.4))
    assert bool(torch.isfinite(result.weight.weight).all())
    assert torch.equal(result.weight.weight[:, ~alive], weight[:, ~alive] * result.weight.mask[:, ~alive])
    error = ((weight - result.weight.weight).float() @ (inputs * alive).T).square().mean(1)
    torch.testing.assert_close(result.error, error, rtol=2e-3, atol=0)  # float32 sums, and a difference in bfloat16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_leaves_the_smallest_weights_out_and_says_so(pruner, bad, weight, hessian):
    next(hessian.panels())[3, 3] = bad
    result = pruner.prune(weight, pruner.prepare(hessian), Sparsity(0.5))
    assert any("Hessian" in note for note in result.notes)
    sizes = weight.float().abs()
    gone, kept = sizes.masked_fill(result.weight.mask, 0.0), sizes.masked_fill(~result.weight.mask, torch.inf)
    assert bool((gone.amax(1) <= kept.amin(1)).all())
    assert torch.equal(result.weight.weight, weight * result.weight.mask)
    torch.testing.assert_close(result.error, (weight - result.weight.weight).float().square().sum(1))


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.5, 50])
def test_a_sparsity_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"sparsity={wrong} is out of range"):
        Sparsity(wrong)


def test_a_share_of_columns_is_not_lost_to_the_last_bit_of_a_product():
    assert [Sparsity(tenth / 10).pruned(10) for tenth in range(1, 10)] == list(range(1, 10))
    assert Sparsity(0.57).pruned(100) == 57  # 0.57 * 100 is 56.99999999999999
    assert Sparsity(0.5).pruned(7) == 3


def test_of_equal_scores_the_first_are_lowest():
    score = torch.tensor([[1.0, 0.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0, 0.0]])
    assert lowest(score, 2).int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    each = lowest(score, torch.tensor([3, 0, 5])).int().tolist()
    assert each == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert not bool(lowest(score, 0).any())
