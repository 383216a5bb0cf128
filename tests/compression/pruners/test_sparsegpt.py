from itertools import pairwise

import pytest
import torch

from hasten.accel.compression.calibration.inputs import Inputs
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.pruners.base import Sparsity, lowest
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.pruners.sparsegpt import SparseGPT
from hasten.accel.compression.pruners.wanda import Wanda
from hasten.accel.errors import UserError
from tests.compression.pruners.conftest import COLUMNS, hessian_of
from tests.compression.trained import target_hessians, target_model


def textbook(weight, hessian, mask, damping):
    """The paper's column updates by the inverse Hessian, for a given mask."""
    h = hessian.double().clone()
    h.diagonal().add_(damping * float(hessian.diagonal().mean()))
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = weight.double().clone()
    for k in range(w.shape[1]):
        gone = torch.where(mask[:, k], 0.0, w[:, k]) / upper[k, k]
        w[:, k:] -= gone[:, None] * upper[k, k:]
    return w * mask


@pytest.mark.parametrize("block", [1, 32, 100, 128, 1000])
def test_the_kept_weights_are_those_of_the_papers_algorithm(block, weight, inputs, hessian):
    pruner = SparseGPT(damping=0.01, block=block)
    pruned = pruner.prune(weight.float(), pruner.prepare(hessian), Sparsity(0.5)).weight
    expected = textbook(weight, inputs.T @ inputs / len(inputs), pruned.mask, pruner.damping)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-4)  # float32 against float64


def test_the_first_block_loses_the_papers_lowest_saliencies(weight, inputs, hessian):
    damped = (inputs.T @ inputs / len(inputs)).double()
    damped.diagonal().add_(0.01 * float(damped.diagonal().mean()))
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).diagonal().float()
    saliency = (weight.float() / inverse)[:, :32].square()
    pruner = SparseGPT()
    mask = pruner.prune(weight.float(), pruner.prepare(hessian), Sparsity(0.5)).weight.mask[:, :32]
    expected = ~lowest(saliency, (~mask).sum(1))
    # float32 against float64: two saliencies that are almost equal may change places.
    assert float((mask != expected).float().mean()) < 0.005


def test_columns_after_all_pruned_ones_are_the_least_squares_optimum():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    weight[:, :3] *= 1e-3  # the first three go
    pruner = SparseGPT(damping=1e-9)
    pruned = pruner.prune(weight, pruner.prepare(hessian_of(inputs)), Sparsity(0.5)).weight
    assert pruned.mask.tolist() == [[False] * 3 + [True] * 3] * 4
    best = torch.linalg.lstsq(inputs[:, 3:].double(), (inputs @ weight.T).double()).solution.T
    torch.testing.assert_close(pruned.weight[:, 3:].double(), best, rtol=1e-4, atol=1e-5)


def test_two_equal_inputs_need_one_weight():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(100, 1, generator=generator)
    weight = torch.tensor([[0.25, 1.0], [-2.0, -0.5]])
    pruner = SparseGPT(damping=1e-6)
    result = pruner.prune(weight, pruner.prepare(hessian_of(one.repeat(1, 2))), Sparsity(0.5))
    # The first column is pruned: the second replaces it without error. float32 loses part of a small damping.
    torch.testing.assert_close(result.weight.weight, torch.tensor([[0.0, 1.25], [0.0, -2.5]]), rtol=1e-3, atol=0)
    assert bool((result.error < 1e-4 * result.power).all())


def test_inputs_that_are_not_correlated_leave_kept_weights_alone_and_it_prunes_as_wanda():
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(512, 160, generator=generator))
    inputs = q * torch.logspace(-1, 1, 160)
    weight = torch.randn(24, 160, generator=generator)
    results = [
        method.prune(weight, method.prepare(hessian_of(inputs)), Sparsity(0.5))
        for method in (SparseGPT(damping=1e-7), Wanda())
    ]
    assert torch.equal(results[0].weight.mask, results[1].weight.mask)
    torch.testing.assert_close(results[0].weight.weight, results[1].weight.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9])
def test_of_correlated_inputs_the_output_errs_less_than_by_wanda_and_wandas_less_than_by_magnitude(
    fraction, weight, hessian
):
    errors = [
        pruner.prune(weight, pruner.prepare(hessian), Sparsity(fraction)).error
        for pruner in (SparseGPT(), Wanda(), Magnitude())
    ]
    for better, worse in pairwise(errors):
        assert float(better.sum()) < 0.95 * float(worse.sum())


def test_kept_weights_compensate_for_rounding_to_the_checkpoints_dtype(weight, inputs, hessian):
    pruner = SparseGPT(damping=1e-6)
    fine = pruner.prune(weight.float(), pruner.prepare(hessian), Sparsity(0.3)).weight
    coarse = pruner.prune(weight, pruner.prepare(hessian), Sparsity(0.3)).weight
    same = (fine.mask == coarse.mask).all(1)  # rows whose mask the rounding did not change
    assert int(same.sum()) > 8
    gaps = [(one.float() - fine.weight)[same] @ inputs.T for one in (coarse.weight, fine.weight.bfloat16())]
    assert float(gaps[0].square().sum()) < 0.8 * float(gaps[1].square().sum())


def test_weights_of_inputs_that_are_always_zero_are_pruned_first(weight, inputs):
    dead = torch.arange(COLUMNS) % 3 == 0
    pruner = SparseGPT()
    tiny = inputs * ~dead * 1e-4  # far below the 1 that stands in for a dead column's Hessian
    mask = pruner.prune(weight, pruner.prepare(hessian_of(tiny)), Sparsity(0.5)).weight.mask
    assert not bool(mask[:, dead].any())


def test_a_hessian_that_cannot_be_factored_is_damped_more_and_says_so(weight):
    hessian = Hessian(COLUMNS)
    hessian.add(torch.ones(4, COLUMNS) * 1e3)  # rank one: float32 loses the small damping beside it
    next(hessian.panels()).sub_(0.03 * torch.eye(128) * 4e6)
    pruner = SparseGPT()
    result = pruner.prune(weight, pruner.prepare(hessian), Sparsity(0.5))
    assert any("damping raised" in note for note in result.notes)
    assert bool(torch.isfinite(result.weight.weight).all())


@pytest.mark.parametrize("wrong", [{"damping": 0.0}, {"damping": 0.01, "max_damping": 0.001}, {"block": 0}])
def test_wrong_hyper_parameters_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SparseGPT(**wrong)


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_on_held_out_text_a_trained_layer_errs_least_by_sparsegpt_then_wanda_then_magnitude(layer):
    name = f"model.layers.0.{layer}"
    weight = target_model().checkpoint.tensor(f"{name}.weight")
    hessian, held_out = target_hessians("train", 16)[name], Inputs(target_hessians("held_out", 4)[name])
    errors = []
    for pruner in (SparseGPT(), Wanda(), Magnitude()):
        pruned = pruner.prune(weight, pruner.prepare(hessian), Sparsity(0.5)).weight.weight
        errors.append(float(held_out.power(weight - pruned).sum() / held_out.power(weight).sum()))
    assert errors[0] < 0.85 * errors[1]
    assert errors[1] < errors[2]
