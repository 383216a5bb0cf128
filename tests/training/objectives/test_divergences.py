"""Objectives on distributions over a few tokens, worked out by hand."""

import pytest
import torch

from hasten.accel.training.heads.vocabulary import DraftVocabulary
from hasten.accel.training.objectives.earth_mover import EarthMover
from hasten.accel.training.objectives.reverse_kl import reverse_kl
from hasten.accel.training.objectives.soft_cross_entropy import soft_cross_entropy

ALL, ONE = DraftVocabulary.full(4), torch.ones(1)
IDS = torch.tensor([[0, 1, 2, 3]])
P, Q = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])


def test_reverse_kl_is_exact_if_all_ids_are_recorded_and_a_lower_bound_if_not():
    exact = float((Q * (Q / P).log()).sum())
    assert float(reverse_kl(Q.log(), IDS[:, :3], P[:, :3].log(), ALL, ONE)) == pytest.approx(exact, abs=1e-3)
    merged = torch.tensor([[0.4, 0.3, 0.3]]), torch.tensor([[0.1, 0.2, 0.7]])
    bound = float((merged[1] * (merged[1] / merged[0]).log()).sum())
    found = float(reverse_kl(Q.log(), IDS[:, :2], P[:, :2].log(), ALL, ONE))
    assert found == pytest.approx(bound, abs=1e-5)
    assert found < exact


def test_reverse_kl_is_zero_for_the_targets_own_distribution_and_where_nothing_was_recorded():
    assert float(reverse_kl(P.log(), IDS[:, :3], P[:, :3].log(), ALL, ONE)) == pytest.approx(0, abs=1e-5)
    nothing = torch.full((1, 2), -torch.inf)
    logits = Q.log().requires_grad_()
    loss = reverse_kl(logits, torch.zeros(1, 2, dtype=torch.long), nothing, ALL, ONE)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert logits.grad.isfinite().all()


def test_the_bound_of_emo_is_the_mean_cost_of_moving_every_share_to_every_other():
    torch.manual_seed(0)
    embedding = torch.randn(4, 5)
    unit = embedding / embedding.norm(dim=-1, keepdim=True)
    cost = 1 - unit @ unit.T
    expected = float(P[0] @ cost @ Q[0])
    found = EarthMover.of(embedding).bound(Q.log(), IDS, P.log(), ALL)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_to_say_a_like_token_costs_emo_less_than_to_say_another_one():
    objective = EarthMover.of(torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.0, -1.0]]))
    target = torch.tensor([[0]]), torch.zeros(1, 1)
    like, unlike = (torch.full((1, 4), -9.0).index_fill(1, torch.tensor([said]), 9.0) for said in (1, 2))
    assert float(objective.bound(like, *target, ALL)) < 0.01
    assert float(objective.bound(unlike, *target, ALL)) > 1.9


def test_the_loss_of_emo_has_the_size_of_the_cross_entropy():
    logits = Q.log()
    loss = EarthMover.of(torch.eye(4))(logits, IDS, P.log(), ALL, 3 * ONE)
    torch.testing.assert_close(loss, soft_cross_entropy(logits, IDS, P.log(), ALL, 3 * ONE))
