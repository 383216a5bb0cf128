"""FSPAD: what is said and what is carried part, and only the latter is aligned."""

from dataclasses import replace

import pytest
import torch

from hasten.accel.errors import UserError
from hasten.accel.training.heads.fspad import Fspad
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import batch_of


def gradients(alignment):
    head = Fspad(alignment=alignment, ttt_steps=1)
    network, batch = network_of(head), batch_of(head)
    head.loss(network, batch).value.backward()
    return network.mlp.down.weight.grad, network.fuse.weight.grad


def test_alignment_trains_what_is_carried_and_not_what_is_said():
    none, one = gradients(0.0)[0], gradients(1.0)[0]
    said, carried = none.chunk(2)
    # With one step nothing reads what is carried, except for its alignment.
    assert not carried.any()
    assert one.chunk(2)[1].any()
    torch.testing.assert_close(one.chunk(2)[0], said)


def test_a_carried_state_that_is_the_targets_up_to_its_scale_costs_nothing():
    head = Fspad(alignment=1.0)
    network, batch = network_of(head).eval(), batch_of(head)
    targets = batch.at_depth(1)
    count = targets.valid.shape[1]
    added = []

    class Total:
        def add_loss(self, depth, loss):
            added.append(loss)

    with torch.no_grad():
        fused = network.fuse(batch.features[:, 1 : 1 + count])
        for carried in (3 * fused, -fused):
            step = next(network.unroll(batch))
            valid = replace(step, carried=carried[targets.valid])
            head.add_losses(Total(), network, batch, targets, 1, valid)
    torch.testing.assert_close(added[0], torch.tensor(0.0), atol=1e-6, rtol=0)
    assert added[1] > 0.1


def test_a_negative_alignment_is_refused():
    with pytest.raises(UserError, match="alignment=-1"):
        Fspad(alignment=-1)
