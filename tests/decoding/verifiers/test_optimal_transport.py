from itertools import combinations

import pytest
import torch

from hasten.accel.decoding.verifiers.optimal_transport import optimal_acceptance
from hasten.accel.errors import UserError

GENERATOR = torch.Generator().manual_seed(0)
PAIRS = [tuple(torch.rand(2, size, generator=GENERATOR, dtype=torch.float64).softmax(-1)) for size in (2, 4, 6)]


def least_cut(p, q, k):
    """The same by the theorem of the maximum flow: the least 1 + p(T) - q(T)^k of all sets T of tokens."""
    subsets = [list(chosen) for size in range(len(p) + 1) for chosen in combinations(range(len(p)), size)]
    return min(1 + float(p[chosen].sum() - q[chosen].sum() ** k) for chosen in subsets)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_optimum_is_the_least_cut(p, q, k):
    assert optimal_acceptance(p**3 / (p**3).sum(), q, k) == pytest.approx(least_cut(p**3 / (p**3).sum(), q, k))


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_one_draw_is_accepted_as_often_as_the_two_distributions_overlap(p, q):
    assert optimal_acceptance(p, q, 1) == pytest.approx(float(torch.minimum(p, q).sum()))


def test_two_draws_by_hand():
    # The target always says 0: what counts is whether it is drawn.
    assert optimal_acceptance(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75]), 2) == pytest.approx(1 - 0.75**2)


def test_what_it_cannot_solve_is_refused():
    with pytest.raises(UserError, match="k=0 must be 1 or more"):
        optimal_acceptance(torch.ones(2) / 2, torch.ones(2) / 2, 0)
    with pytest.raises(UserError, match="target_probs has 13 tokens"):
        optimal_acceptance(torch.ones(13) / 13, torch.ones(13) / 13, 2)
