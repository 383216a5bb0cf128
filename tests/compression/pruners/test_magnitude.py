import torch

from hasten.accel.compression.pruners.base import Sparsity
from hasten.accel.compression.pruners.magnitude import Magnitude


def test_a_row_worked_by_hand():
    weight = torch.tensor([[0.5, -0.1, 2.0, -3.0], [-1.0, 1.5, 0.25, -0.125]])
    pruner = Magnitude()
    result = pruner.prune(weight, pruner.prepare(None), Sparsity(0.5))
    assert result.weight.weight.tolist() == [[0.0, 0.0, 2.0, -3.0], [-1.0, 1.5, 0.0, 0.0]]
    torch.testing.assert_close(result.error, torch.tensor([0.26, 0.078125]))
    torch.testing.assert_close(result.power, torch.tensor([13.26, 3.328125]))


def test_no_pruned_weight_is_larger_than_a_kept_one_and_kept_ones_are_unchanged(weight, hessian):
    pruner = Magnitude()
    pruned = pruner.prune(weight, pruner.prepare(hessian), Sparsity(0.6)).weight
    sizes = weight.float().abs()
    largest_gone = sizes.masked_fill(pruned.mask, -torch.inf).amax(1)
    smallest_kept = sizes.masked_fill(~pruned.mask, torch.inf).amin(1)
    assert bool((largest_gone <= smallest_kept).all())
    assert torch.equal(pruned.weight[pruned.mask], weight[pruned.mask])


def test_statistics_change_the_reported_error_and_no_weight(weight, inputs, hessian):
    pruner = Magnitude()
    blind, seeing = (pruner.prune(weight, pruner.prepare(known), Sparsity(0.5)) for known in (None, hessian))
    assert torch.equal(blind.weight.weight, seeing.weight.weight)
    gone = (weight - blind.weight.weight).float()
    torch.testing.assert_close(blind.error, gone.square().sum(1))
    torch.testing.assert_close(seeing.error, (gone @ inputs.T).square().mean(1), rtol=1e-3, atol=0)
