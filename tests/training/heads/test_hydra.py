"""Hydra: what a head computes, and what it reads of the drafted tokens and of the text."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import TargetFacts
from hasten.accel.training.heads.hydra import Hydra
from hasten.accel.training.heads.hydra_pp import HydraPP
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import batch_of

FACTS = replace(TargetFacts.of(resolve("embedded:target")), vocabulary=6, hidden_size=2)


def test_the_second_head_reads_the_state_and_the_embeddings_of_two_tokens():
    network = Hydra(depth=2, blocks=2).build(FACTS, DraftVocabulary.full(6))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network.attach(torch.randn(6, 2, generator=generator))
    hidden = torch.tensor([[0.5, -1.0]])
    with torch.no_grad():
        frontier = network.read([None], [hidden], [torch.tensor([3])])
        drafted = network.step([None], frontier, torch.tensor([0, 0]), torch.tensor([1, 4]))
    state = network.state_dict()
    for row, token in enumerate((1, 4)):
        x = torch.cat([hidden[0], network.embed(torch.tensor(3)), network.embed(torch.tensor(token))])
        linear, res = (
            [state[f"heads.1.0.{name}.{part}"] for part in ("weight", "bias")] for name in ("linear", "res_connection")
        )
        x = F.linear(x, *res) + F.silu(F.linear(x, *linear))
        x = x + F.silu(F.linear(x, state["heads.1.1.linear.weight"], state["heads.1.1.linear.bias"]))
        torch.testing.assert_close(drafted.logits[row], F.linear(x, state["outputs.1.weight"], state["outputs.1.bias"]))


def test_an_untrained_head_drafts_what_the_target_says_next_whatever_was_drafted():
    network = Hydra().build(FACTS, DraftVocabulary.full(6))
    network.attach(torch.randn(6, 2))
    hidden = torch.tensor([[0.5, -1.0]])
    frontier = network.read([None], [hidden], [torch.tensor([3])])
    torch.testing.assert_close(frontier.logits, network.outputs[0](hidden))


@pytest.mark.parametrize(("head", "sees_text"), [(Hydra(), False), (HydraPP(), True)])
def test_hydra_reads_one_state_and_hydra_pp_those_of_the_text(head, sees_text):
    network, batch = network_of(head).eval(), batch_of(head)
    features = batch.features.clone()
    features[:, 4] += 1
    with torch.no_grad():
        one = head.teacher_forced(network, batch)
        two = head.teacher_forced(network, replace(batch, features=features))
    for before, after in zip(one, two, strict=True):
        assert torch.equal(before[:, :4], after[:, :4])
        assert not torch.allclose(before[:, 4], after[:, 4])
        assert torch.allclose(before[:, 5], after[:, 5]) is not sees_text


def test_a_draft_depends_on_every_token_of_its_path():
    head = Hydra()
    network, batch = network_of(head).eval(), batch_of(head)
    tokens = batch.tokens.clone()
    tokens[:, 5] = (tokens[:, 5] + 1) % 100
    with torch.no_grad():
        one = head.teacher_forced(network, batch)
        two = head.teacher_forced(network, replace(batch, tokens=tokens))
    for depth, (before, after) in enumerate(zip(one, two, strict=True), 1):
        changed = [row for row in range(before.shape[1]) if not torch.allclose(before[:, row], after[:, row])]
        # Depth d at t reads the tokens t + 1 to t + d.
        assert changed == [row for row in range(before.shape[1]) if row < 5 <= row + depth]


def test_blocks_behind_the_first_are_one_if_asked_for():
    shared = Hydra(blocks=3, shares_blocks=True).build(FACTS, DraftVocabulary.full(6))
    own = Hydra(blocks=3).build(FACTS, DraftVocabulary.full(6))
    assert shared.heads[0][1] is shared.heads[0][2]
    assert own.heads[0][1] is not own.heads[0][2]
    assert shared.heads[0][1] is not shared.heads[1][1]


def test_an_impossible_depth_is_named():
    with pytest.raises(UserError, match="depth=0 is wrong"):
        Hydra(depth=0)
