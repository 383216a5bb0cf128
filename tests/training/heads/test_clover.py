"""Clover: the latest token updates the state, by head, with the cosine; the block begins as the target's last layer."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.attention import block_causal
from hasten.accel.training.heads.clover import AttentionDecoder, Clover
from hasten.accel.training.heads.draft_head import TargetFacts, TargetWeights
from tests.decoding.drafters.heads.untrained import network_of, vocabulary
from tests.training.heads.test_draft_heads import batch_of

FACTS = TargetFacts.of(resolve("embedded:target"))


def test_each_head_adds_its_value_times_the_cosine_of_query_and_key():
    decoder = AttentionDecoder(replace(FACTS, hidden_size=4, heads=2))
    for linear in (decoder.query, decoder.key, decoder.value):
        linear.weight.data.copy_(torch.eye(4))
    decoder.value.weight.data.mul_(10)
    hidden = torch.tensor([3.0, 0.0, 0.0, 2.0])  # its norm points the same way
    embedded = torch.tensor([3.0, 4.0, 0.0, -5.0])
    # Cosines: of (1, 0) with (3, 4) 0.6, of (0, 1) with (0, -5) -1.
    expected = hidden + torch.tensor([0.6 * 30, 0.6 * 40, 0.0, -1 * -50])
    with torch.no_grad():
        torch.testing.assert_close(decoder(hidden, embedded), expected)


def test_the_block_begins_as_the_targets_last_layer_with_its_norm():
    folder = resolve("embedded:target")
    network = Clover(blocks=1).build(FACTS, vocabulary(FACTS))
    Clover(blocks=1).initialise(network, TargetWeights.of(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(100, 110)[None]
    positions = torch.arange(10)[None]
    with torch.no_grad():
        *_, before, after = model(tokens, output_hidden_states=True).hidden_states
        own = network.block_norm(network.blocks[0](before, positions, block_causal(torch.zeros_like(tokens))))
    # float32 sums in another order.
    torch.testing.assert_close(own, after, rtol=1e-3, atol=1e-3)
    assert torch.equal(network.output.weight, TargetWeights.of(folder).output[network.vocabulary.ids])


def test_the_state_carries_every_token_of_a_path_to_the_later_depths():
    network, batch = network_of(Clover()).eval(), batch_of(Clover())
    state = network.begin()
    with torch.no_grad():
        frontier = network.read([state], [batch.features[0, :3]], [batch.tokens[0, 1:4]])
        after = [network.step([state], frontier, torch.tensor([0, 0]), torch.tensor(ids)) for ids in ([7, 8], [9, 8])]
        last = [network.step([state], step, torch.tensor([0, 1]), torch.tensor([5, 5])).logits for step in after]
    assert not torch.allclose(last[0][0], last[1][0], atol=1e-3)  # after 7 5 and after 9 5
    torch.testing.assert_close(last[0][1], last[1][1])  # after 8 5, both


def test_alignment_is_the_smooth_distance_from_the_targets_state_at_the_drafted_token():
    head, batch = Clover(depth=1, alignment=2.0), batch_of(Clover())
    network = network_of(head)
    batch = replace(batch, features=torch.zeros_like(batch.features))
    with torch.no_grad():
        said = next(network.unroll(batch))
        with_it, without = head.loss(network, batch).value, replace(head, alignment=0.0).loss(network, batch).value
    magnitude = said.abs()
    distance = torch.where(magnitude < 1, magnitude**2 / 2, magnitude - 0.5).mean()
    torch.testing.assert_close(with_it - without, 2 * distance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"blocks": 0}, {"decay": 0.0}, {"alignment": -1.0}])
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Clover(**wrong)


def test_a_target_whose_heads_do_not_divide_its_width_is_refused():
    with pytest.raises(UserError, match="hidden_size=256 is a multiple of its 3"):
        Clover().build(replace(FACTS, heads=3), vocabulary(FACTS))
