"""What every head of virtual tokens must do in training."""

from dataclasses import replace

import pytest
import torch

from hasten.accel.training.heads.draft_head import HeadBatch, load_head
from hasten.accel.training.heads.hidden_transfer import HiddenTransfer
from hasten.accel.training.heads.ppd import ParallelPrompts
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import FACTS, LENGTH, batch_of, losses_of_steps

HEADS = [ParallelPrompts(ensemble=2, anchors=8), HiddenTransfer(anchors=8, enter=(1, 2, 3))]


@pytest.fixture(scope="module", params=HEADS, ids=lambda head: head.drafter)
def head(request):
    return request.param


@pytest.fixture(scope="module")
def network(head):
    return network_of(head).eval()


def test_a_document_does_not_see_the_one_before_it_in_its_window(head, network):
    packed = batch_of(head, ((5, LENGTH), (5, LENGTH)))
    alone = HeadBatch(**{name: value[:, 5:] for name, value in vars(packed).items()})
    for together, single in zip(head.teacher_forced(network, packed), head.teacher_forced(network, alone), strict=True):
        torch.testing.assert_close(together[:, 5:], single, rtol=1e-3, atol=1e-3)


def test_training_lowers_the_loss_and_leaves_the_target_alone(head):
    network = network_of(head, seed=1)
    frozen = {name: value.clone() for name, value in network.frozen.model.state_dict().items()}
    losses = losses_of_steps(head, network, batch_of(head), 8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in network.frozen.model.state_dict().items())


def test_tokens_that_are_not_learned_change_no_loss(head, network):
    batch = batch_of(head)
    learned = batch.learned.clone()
    learned[:, 6:] = False
    other = batch.top_ids.clone()
    other[:, 6:] = other[:, 6:].flip(-1) + 1
    values = []
    for top_ids in (batch.top_ids, other):
        torch.manual_seed(0)
        with torch.no_grad():
            values.append(head.loss(network, replace(batch, learned=learned, top_ids=top_ids)).value)
    assert torch.equal(*values)


def test_a_stored_head_is_the_same_up_to_bfloat16(head, network, tmp_path):
    head.save(network, tmp_path, FACTS, {})
    again, loaded, _ = load_head(tmp_path, type(head), FACTS)
    assert again == head
    expected = network.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-8, atol=0)  # half a unit in the last place
