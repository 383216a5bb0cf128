"""LUD: what is a lexical unit, and what its pads read."""

from dataclasses import replace

import pytest
import torch

from hasten.accel.errors import UserError
from hasten.accel.training.heads.draft_head import HeadBatch
from hasten.accel.training.heads.lud import Lud
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import batch_of

HEAD = Lud(depth=3, unit=0.5, outside=0.0)


@pytest.fixture(scope="module")
def network():
    return network_of(HEAD).eval()


def batch_with(probs):
    """One window in which the target has probs[t] for the text's token t; another id has the rest."""
    tokens = torch.arange(10, 10 + len(probs))[None]
    after = torch.tensor([*probs[1:], 0.5])[None]
    top_ids = torch.stack([torch.cat([tokens[:, 1:], tokens[:, :1]], 1), torch.full_like(tokens, 500)], -1)
    made = batch_of(HEAD, ((len(probs),),))
    return replace(made, tokens=tokens, top_ids=top_ids, top_log_probs=torch.stack([after, 1 - after], -1).log())


def test_a_unit_goes_on_as_long_as_the_target_is_sure_of_the_text(network):
    # Tokens 0 to 7. At t = 0 token 1 is known, whose unit goes on with 2 and 3, and ends before 4.
    batch = batch_with([0.9, 0.9, 0.9, 0.9, 0.2, 0.9, 0.9, 0.9])
    found = [HEAD.continues(batch.at_depth(depth))[0].tolist() for depth in (1, 2, 3)]
    assert found[0] == [True, True, False, True, True, True]
    assert found[1] == [True, False, True, True, True]
    assert found[2] == [False, True, True, True]


def test_tokens_behind_the_end_of_a_unit_do_not_count(network):
    sure = batch_with([0.9, 0.9, 0.9, 0.9, 0.9])
    ended = batch_with([0.9, 0.9, 0.2, 0.9, 0.9])
    loss = HEAD.loss(network, sure).parts
    parts = HEAD.loss(network, ended).parts
    assert parts["loss_3"] == 0, "the only draft is token 4, and token 2 has ended the unit"
    assert loss["loss_3"] > 0
    assert replace(HEAD, outside=0.5).loss(network, ended).parts["loss_3"] > 0


def test_pads_read_no_token_behind_the_known_one(network):
    batch = batch_of(HEAD)
    tokens = batch.tokens.clone()
    tokens[:, 5:] += 1
    with torch.no_grad():
        pairs = zip(
            HEAD.teacher_forced(network, batch),
            HEAD.teacher_forced(network, HeadBatch(**{**vars(batch), "tokens": tokens})),
            strict=True,
        )
    for one, two in pairs:
        assert torch.equal(one[:, :4], two[:, :4])
        assert not torch.allclose(one[:, 4], two[:, 4])


def test_drafts_of_a_depth_do_not_depend_on_those_before(network):
    batch = batch_of(HEAD)
    state = [network.begin()]
    with torch.no_grad():
        frontier = network.read(state, [batch.features[0, :3]], [batch.tokens[0, 1:4]])
        found = network.step(state, frontier, torch.tensor([0, 0]), torch.tensor([5, 6]))
    assert torch.equal(found.logits[0], found.logits[1])
    assert state[0].length == 3, "pads leave no trace in the cache"


@pytest.mark.parametrize(("name", "value"), [("depth", 1), ("unit", 1.0), ("outside", -0.1), ("decay", 0)])
def test_what_is_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"{name}={value} is wrong"):
        Lud(**{name: value})
