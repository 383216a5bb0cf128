import torch

from hasten.accel.compression.pruners.base import Sparsity
from hasten.accel.compression.pruners.magnitude import Magnitude
from hasten.accel.compression.pruners.wanda import Wanda
from tests.compression.pruners.conftest import hessian_of


def test_a_small_weight_of_a_large_input_outlives_a_large_weight_of_a_tiny_one():
    inputs = torch.tensor([[10.0, 0.1, 1.0, -1.0], [-10.0, 0.1, 1.0, 1.0]])  # root mean squares 10, 0.1, 1, 1
    weight = torch.tensor([[0.5, 4.0, 1.0, 0.25], [0.01, 30.0, 0.5, -0.75]])  # products: 5, 0.4, 1, 0.25; 0.1, 3, …
    pruner = Wanda()
    result = pruner.prune(weight, pruner.prepare(hessian_of(inputs)), Sparsity(0.5))
    assert result.weight.weight.tolist() == [[0.5, 0.0, 1.0, 0.0], [0.0, 30.0, 0.0, -0.75]]
    # Columns three and four are not correlated; two is constant and so is three: (0.4)², (0.25)²; (0.01 * 10), 0.5.
    torch.testing.assert_close(result.error, torch.tensor([0.16 + 0.0625, 0.01 + 0.25]))


def test_with_inputs_of_equal_size_it_is_magnitude(weight, inputs):
    even = inputs / inputs.square().mean(0).sqrt()
    hessian = hessian_of(even.double().float())
    masks = [
        method.prune(weight.float(), method.prepare(hessian), Sparsity(0.5)).weight.mask
        for method in (Wanda(), Magnitude())
    ]
    # Norms are equal up to float32: weights that are equal in bfloat16 may change places.
    assert float((masks[0] != masks[1]).float().mean()) < 0.02


def test_of_uncorrelated_inputs_no_mask_of_as_many_weights_makes_less_error():
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(64, 6, generator=generator))
    inputs = q * 8 * torch.tensor([0.1, 3.0, 1.0, 0.5, 2.0, 0.2])
    weight = torch.randn(5, 6, generator=generator)
    pruner = Wanda()
    result = pruner.prune(weight, pruner.prepare(hessian_of(inputs)), Sparsity(0.5))
    every = torch.tensor([[bool(number >> bit & 1) for bit in range(6)] for number in range(64)])
    every = every[every.sum(1) == 3]  # (20, 6)
    errors = ((weight[:, None] * every) @ inputs.T).square().mean(-1)
    torch.testing.assert_close(result.error, errors.amin(1))


def test_kept_weights_are_unchanged(weight, hessian):
    pruner = Wanda()
    pruned = pruner.prune(weight, pruner.prepare(hessian), Sparsity(0.6)).weight
    assert torch.equal(pruned.weight[pruned.mask], weight[pruned.mask])
