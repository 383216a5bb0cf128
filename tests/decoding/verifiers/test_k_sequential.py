import math

import numpy as np
import pytest
import torch

from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.verifiers.k_sequential import KSequential, acceptance, least_rho
from hasten.accel.decoding.verifiers.optimal_transport import optimal_acceptance
from hasten.accel.decoding.verifiers.rejection import distribution
from tests.decoding.verifiers.drafts import DRAFT, KINDS, TARGET, rows

RANDOM = np.random.default_rng(0)
PAIRS = [tuple(RANDOM.dirichlet(np.full(size, 0.7), 2)) for size in (2, 3, 5, 8, 8)]
PAIRS += [(distribution(TARGET[0]), distribution(DRAFT[0])), (np.array([0.5, 0.5, 0]), np.array([0, 0, 1.0]))]
# rho is bisected 30 times in an interval no longer than K.
PRECISION = 8 * 2.0**-30


def beta(p, q, rho):
    return np.minimum(q, p / rho).sum()


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_rho_is_where_as_much_is_accepted_as_the_target_has(p, q, k):
    rho = least_rho(p, q, k)
    assert 1 <= rho <= k
    assert 1 - (1 - beta(p, q, rho)) ** k == pytest.approx(rho * beta(p, q, rho), abs=PRECISION)
    # What is taken of a token by accepting, p_acc / beta times min(q, p / rho), is never more than the target's p.
    if beta(p, q, rho) > 0:
        share = (1 - (1 - beta(p, q, rho)) ** k) / beta(p, q, rho)
        assert (p - np.minimum(q, p / rho) * share >= -1e-12).all()


def test_rho_of_two_draws_by_hand():
    # p = (1, 0), q = (a, 1 - a): beta = min(a, 1 / rho); with a rho < 1 it is a, and rho = (1 - (1 - a)^2) / a = 2 - a.
    p, q = np.array([1.0, 0.0]), np.array([0.25, 0.75])
    assert least_rho(p, q, 2) == pytest.approx(1.75, abs=PRECISION)
    assert acceptance(p, q, 2) == pytest.approx(1 - 0.75**2, abs=PRECISION)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_one_draw_is_speculative_sampling(p, q):
    assert least_rho(p, q, 1) == 1
    assert acceptance(p, q, 1) == pytest.approx(np.minimum(p, q).sum(), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_it_accepts_at_least_1_minus_1_over_e_of_the_optimum_and_no_more_than_it(p, q, k):
    most = optimal_acceptance(torch.from_numpy(p), torch.from_numpy(q), k)
    assert (1 - 1 / math.e) * most - PRECISION <= acceptance(p, q, k) <= most + PRECISION


def test_draws_are_kept_as_often_as_the_formula_says():
    count, kind = 3000, KINDS["independent"]
    generator = torch.Generator().manual_seed(0)
    kept = sum(
        bool(KSequential().verify(tree, rows(tree, Sampling(temperature=1.0)), generator).path)
        for tree in kind.trees(count)
    )
    share = acceptance(distribution(TARGET[0]), distribution(DRAFT[0]), kind.first)
    assert abs(kept - count * share) < 5 * math.sqrt(count * share * (1 - share))  # five standard deviations
