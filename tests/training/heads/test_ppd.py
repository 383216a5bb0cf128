"""PPD's training: what prompt tokens see, and what is trained."""

from dataclasses import replace

import pytest
import torch

from hasten.accel.training.heads.draft_head import HeadBatch, load_head
from hasten.accel.training.heads.ppd import ParallelPrompts
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import FACTS, LENGTH, batch_of, losses_of_steps

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
                states = states_of(network, text, batch, anchors)[row, column]
                out = network.frozen.model.get_decoder()(batch.tokens[row : row + 1]).last_hidden_state[0]
                expected = out[first : first + HEAD.depth, None].expand_as(states)
                torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_a_document_does_not_see_the_one_before_it_in_its_window(network):
    packed = batch_of(HEAD, ((5, LENGTH), (5, LENGTH)))
    alone = HeadBatch(**{name: value[:, 5:] for name, value in vars(packed).items()})
    for together, single in zip(HEAD.teacher_forced(network, packed), HEAD.teacher_forced(network, alone), strict=True):
        torch.testing.assert_close(together[:, 5:], single, rtol=1e-3, atol=1e-3)


def test_training_lowers_the_loss_and_changes_prompt_tokens_alone():
    network = network_of(HEAD, seed=1)
    frozen = {name: value.clone() for name, value in network.frozen.model.state_dict().items()}
    assert list(dict(network.named_parameters())) == ["prompts"]
    losses = losses_of_steps(HEAD, network, batch_of(HEAD), 8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in network.frozen.model.state_dict().items())


def test_tokens_that_are_not_learned_change_no_loss(network):
    batch = batch_of(HEAD)
    learned = batch.learned.clone()
    learned[:, 6:] = False
    other = batch.top_ids.clone()
    other[:, 6:] = other[:, 6:].flip(-1) + 1
    values = []
    for top_ids in (batch.top_ids, other):
        torch.manual_seed(0)
        with torch.no_grad():
            values.append(HEAD.loss(network, replace(batch, learned=learned, top_ids=top_ids)).value)
    assert torch.equal(*values)


def test_a_stored_head_is_the_same_up_to_bfloat16(network, tmp_path):
    HEAD.save(network, tmp_path, FACTS, {})
    again, loaded, _ = load_head(tmp_path, ParallelPrompts, FACTS)
    assert again == HEAD
    torch.testing.assert_close(loaded.prompts, network.prompts, rtol=2**-8, atol=0)  # half a unit in the last place
