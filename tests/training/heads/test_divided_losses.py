"""The loss of a micro-batch that is divided over processes: for every head what one process finds, and its gradient."""

from dataclasses import replace

import pytest
import torch

from hasten.accel.training.division import WHOLE, Division, divided
from hasten.accel.training.heads.draft_head import HeadBatch
from tests.decoding.drafters.heads.untrained import all_heads, network_of
from tests.training.heads.test_draft_heads import LENGTH, batch_of

WINDOWS, SIZE = 4, 2


@pytest.mark.parametrize("name", sorted(all_heads()))
def test_the_average_over_two_processes_is_the_loss_of_one(name):
    head = all_heads()[name]
    if hasattr(head, "anchors"):
        head = replace(head, anchors=4)  # fewer than a window has tokens, so that they are drawn
    network = network_of(head)
    batch = batch_of(head, ((LENGTH,),) * WINDOWS)
    # Unequal numbers of learned tokens: an average of the processes' own means would be another number.
    learned = batch.learned.clone()
    learned[: WINDOWS // SIZE, 4:] = False
    batch = replace(batch, learned=learned)

    def loss(part, division):
        torch.manual_seed(5)
        network.zero_grad()
        with divided(division):
            value = head.loss(network, part).value
        value.backward()
        gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        return float(value.detach()), gradients

    whole, gradients = loss(batch, WHOLE)
    count = WINDOWS // SIZE
    parts = [
        HeadBatch(**{key: value[rank * count : (rank + 1) * count] for key, value in vars(batch).items()})
        for rank in range(SIZE)
    ]
    # First what each process would send, then the sums, in the order of the calls.
    sent = []
    for rank, part in enumerate(parts):
        own = []
        loss(part, Division(rank, SIZE, lambda value, own=own: own.append(value) or value))
        sent.append(own)
    found = []
    for rank, part in enumerate(parts):
        sums = iter([sum(values) for values in zip(*sent, strict=True)])
        found.append(loss(part, Division(rank, SIZE, lambda value, sums=sums: next(sums))))
    assert sum(value for value, _ in found) / SIZE == pytest.approx(whole, rel=1e-5)
    for expected, *own in zip(gradients, *(of for _, of in found), strict=True):
        # float32 sums in another order.
        torch.testing.assert_close(sum(own) / SIZE, expected, rtol=1e-3, atol=1e-5)
