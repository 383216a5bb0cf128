"""Chimera: an output of the encoder is read as the target's next state, next to trigrams of tokens."""

from dataclasses import replace

import pytest
import torch

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.chimera import Chimera
from hasten.accel.training.heads.draft_head import Frontier, TargetFacts, TargetWeights
from tests.decoding.drafters.heads.untrained import network_of, vocabulary
from tests.training.heads.test_draft_heads import batch_of


@pytest.fixture(scope="module")
def network():
    return network_of(Chimera()).eval()


def test_with_the_targets_next_state_as_output_a_step_is_a_read(network):
    batch = batch_of(Chimera())
    features, tokens = batch.features[0], batch.next_tokens()[0]
    stepping, reading = network.begin(), network.begin()
    with torch.no_grad():
        frontier = network.read([stepping], [features[:4]], [tokens[:4]])
        perfect = replace(frontier.carried, output=features[4:5])
        known = Frontier(frontier.logits, frontier.sequence, 1, perfect)
        stepped = network.step([stepping], known, torch.tensor([0]), tokens[4:5])
        read = network.read([reading], [features[:5]], [tokens[:5]])
    # float32 sums in another order.
    torch.testing.assert_close(stepped.carried.output, read.carried.output, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stepped.carried.output, frontier.carried.output, atol=1e-2)


def test_a_trigram_is_the_next_token_and_two_before_it_of_the_same_document(network):
    batch = batch_of(Chimera(), ((5, 7), (5, 7)))
    embedded = network.embed(batch.tokens)[0]
    with torch.no_grad():
        parts = network._grams(batch, 10)[0].unflatten(-1, (3, -1))
    nothing = torch.zeros_like(embedded[0])
    for place, expected in (
        (3, [embedded[2], embedded[3], embedded[4]]),
        (0, [nothing, nothing, embedded[1]]),
        (5, [nothing, nothing, embedded[6]]),
        (6, [nothing, embedded[6], embedded[7]]),
        (7, [embedded[6], embedded[7], embedded[8]]),
    ):
        assert torch.equal(parts[place], torch.stack(expected)), place


def test_heads_begin_as_the_targets_output_layer_on_its_state_and_on_the_encoders_output():
    folder = resolve("embedded:target")
    facts, weights = TargetFacts.of(folder), TargetWeights.of(folder)
    network = Chimera().build(facts, vocabulary(facts))
    Chimera().initialise(network, weights)
    hidden, output = torch.randn(2, 3, facts.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = (hidden + output) @ weights.output[network.vocabulary.ids].T
    for depth in range(1, 5):
        with torch.no_grad():
            torch.testing.assert_close(network.logits(hidden, output, depth), expected, rtol=1e-4, atol=1e-4)


def test_alignment_is_the_square_distance_from_the_targets_state_at_the_drafted_token():
    head = Chimera(depth=1, alignment=2.0)
    network, batch = network_of(head), batch_of(head)
    with torch.no_grad():
        output = next(network.unroll(batch))
        with_it, without = head.loss(network, batch).value, replace(head, alignment=0.0).loss(network, batch).value
    torch.testing.assert_close(
        with_it - without, 2 * (output - batch.features[:, 1:11]).square().mean(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"decay": 1.5}, {"alignment": -1.0}])
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Chimera(**wrong)
