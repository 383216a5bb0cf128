"""DFlash fills a block in one pass: attention in it goes both ways, and to the context that earlier calls have read."""

from math import exp

import pytest
import torch

from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads import dflash
from hasten.accel.training.heads.dflash import DFlash, spread_layers
from hasten.accel.training.heads.draft_head import TargetFacts
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import batch_of

FACTS = TargetFacts.of(resolve("embedded:target"))


def read_in_parts(network, batch, sizes):
    """The last frontier of reading the first window in parts of these sizes."""
    state, start = network.begin(), 0
    with torch.no_grad():
        for size in sizes:
            part = slice(start, start + size)
            frontier = network.read([state], [batch.features[0, part]], [batch.next_tokens()[0, part]])
            start += size
    return frontier


def test_layers_are_those_of_the_published_heads():
    # Those of the head for Qwen3-8B, [1, 9, 17, 25, 33] from 0.
    assert spread_layers(36, 5) == (2, 10, 18, 26, 34)
    assert spread_layers(4, 3) == (1, 3, FINAL)
    assert spread_layers(4, 9) == (1, 2, 3, FINAL)
    assert spread_layers(30, 1) == (15,)


def test_the_first_draft_sees_the_masks_behind_it():
    long, short = DFlash(block=8), DFlash(block=2)
    networks = [network_of(head).eval() for head in (long, short)]
    networks[1].load_state_dict(networks[0].state_dict())
    batch = batch_of(long)
    first = [read_in_parts(network, batch, [5]).logits for network in networks]
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_later_drafts_cost_no_pass_and_do_not_read_the_tokens_before_them():
    network = network_of(DFlash()).eval()
    frontier = read_in_parts(network, batch_of(DFlash()), [5])
    network.layers = network.output = None  # a step that computed anything would fail
    steps = [network.step([None], frontier, torch.tensor([0, 0]), torch.tensor(ids)) for ids in ([1, 2], [3, 4])]
    assert torch.equal(steps[0].logits, steps[1].logits)
    assert torch.equal(steps[0].logits[0], frontier.carried[0, 1])


def test_the_context_is_kept_when_its_buffer_grows(monkeypatch):
    monkeypatch.setattr(dflash, "_FIRST_CAPACITY", 1)
    network, batch = network_of(DFlash()).eval(), batch_of(DFlash())
    # 18 positions at first; 12 tokens and a block need 20.
    one_by_one, together = (read_in_parts(network, batch, sizes).carried for sizes in ([1] * 12, [12]))
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_depths_are_weighed_by_the_exponential_of_their_distance():
    head = DFlash(block=4, gamma=2.0)
    loss = head.loss(network_of(head), batch_of(head))
    expected = sum(exp(-(depth - 1) / 2) * loss.parts[f"loss_{depth}"] for depth in (1, 2, 3))
    torch.testing.assert_close(loss.value.detach(), expected)


def test_only_the_given_number_of_blocks_is_trained_on():
    head = DFlash(block=3, anchors=2)
    network, counts, blocks = network_of(head), [], None
    blocks = network.blocks
    network.blocks = lambda batch, anchors: (counts.append(anchors), blocks(batch, anchors))[1]
    head.loss(network, batch_of(head))
    [anchors] = counts
    assert anchors.shape == (2, 2)
    assert (anchors[:, 0] < anchors[:, 1]).all()


@pytest.mark.parametrize("wrong", [{"block": 1}, {"depth_layers": 0}, {"features": 0}, {"anchors": 0}, {"gamma": 0.0}])
def test_a_wrong_hyper_parameter_is_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value} is wrong"):
        DFlash(**wrong)
