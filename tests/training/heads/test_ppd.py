"""PPD's training: what prompt tokens see."""

import pytest
import torch

from hasten.accel.training.heads.ppd import ParallelPrompts
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import batch_of

HEAD = ParallelPrompts(ensemble=2, anchors=8)


@pytest.fixture(scope="module")
def network():
    return network_of(HEAD).eval()


@torch.no_grad()
def states_of(network, prompts, batch, anchors):
    """States (B, N, m, e, D) of other prompt tokens."""
    found = []
    inner = network.states

    def noting(*arguments):
        found.append(inner(*arguments))
        return found[-1]

    before = network.prompts.data
    network.prompts.data, network.states = prompts, noting
    try:
        network.logits(batch, anchors)
    finally:
        network.prompts.data = before
        del network.states
    return found[0].view(*anchors.shape, HEAD.depth, HEAD.ensemble, -1)


def test_a_prompt_token_sees_the_earlier_ones_of_its_own_group_only(network):
    batch, anchors = batch_of(HEAD), torch.tensor([[3, 7], [0, 5]])
    prompts = network.prompts.data
    before = states_of(network, prompts, batch, anchors)
    changed = prompts.clone()
    changed.view(HEAD.depth, HEAD.ensemble, -1)[1, 0] += 0.5
    after = states_of(network, changed, batch, anchors)
    differs = (before - after).abs().amax((0, 1, 4)) > 1e-4
    assert differs.tolist() == [[False, False], [True, False], [True, False]]


def test_prompt_tokens_with_the_embeddings_of_a_text_predict_as_the_text_would(network):
    batch, anchors = batch_of(HEAD), torch.tensor([[2, 6], [4, 1]])
    with torch.no_grad():
        for row in range(2):
            for column in range(2):
                first = int(anchors[row, column]) + 1
                text = network.embed(batch.tokens[row, first : first + HEAD.depth]).repeat_interleave(2, 0)
                text = text / (network.embeddings() / network.prompts)
                states = states_of(network, text, batch, anchors)[row, column]
                out = network.frozen.model.get_decoder()(batch.tokens[row : row + 1]).last_hidden_state[0]
                expected = out[first : first + HEAD.depth, None].expand_as(states)
                torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
