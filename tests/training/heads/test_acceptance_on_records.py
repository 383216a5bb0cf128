"""The acceptance head on records has the examples of the training that runs the target."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from hasten.accel.training.heads.acceptance_training import AcceptanceTraining
from hasten.accel.training.heads.draft_head import HeadBatch, TargetFacts
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from tests.training.heads.test_draft_heads import batch_of

FACTS = TargetFacts.of(resolve("embedded:target"))


@pytest.fixture(scope="module")
def head():
    return AcceptanceTraining(blocks=1).on_records(resolve("embedded:draft"))


@pytest.fixture(scope="module")
def network(head):
    torch.manual_seed(0)
    return head.build(FACTS, DraftVocabulary.full(FACTS.vocabulary))


def recorded_by(model, head):
    """A batch with all of what a model says, as if it were the target."""
    batch = batch_of(head)
    with torch.no_grad():
        log_probs, ids = model(batch.tokens).logits.log_softmax(-1).topk(FACTS.vocabulary)
    return HeadBatch(**{**vars(batch), "top_ids": ids, "top_log_probs": log_probs})


def test_tokens_of_a_draft_that_is_the_target_are_all_accepted(head, network):
    draft = AutoModelForCausalLM.from_pretrained(resolve("embedded:draft"), dtype=torch.float32)
    hidden, labels = head.examples(network, recorded_by(draft, head))
    assert hidden.shape == (len(labels), 128)
    torch.testing.assert_close(labels, torch.ones_like(labels), rtol=1e-3, atol=1e-3)


def test_labels_are_the_ratio_of_the_probabilities(head, network):
    target = AutoModelForCausalLM.from_pretrained(resolve("embedded:target"), dtype=torch.float32)
    draft = AutoModelForCausalLM.from_pretrained(resolve("embedded:draft"), dtype=torch.float32)
    batch = recorded_by(target, head)
    torch.manual_seed(1)
    labels = torch.cat([head.examples(network, batch)[1] for _ in range(40)])
    with torch.no_grad():
        probs = [model(batch.tokens).logits[:, :-1].softmax(-1) for model in (target, draft)]
    # The mean acceptance of draws is the overlap of the distributions; 40 * 22 * 0.85 draws.
    expected = float(torch.minimum(*probs).sum(-1).mean())
    assert float(labels.mean()) == pytest.approx(expected, abs=0.05)


def test_training_lowers_the_loss_and_what_is_saved_is_the_drafters_file(head, network, tmp_path):
    batch = batch_of(head)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)
        loss = head.loss(network, batch)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        losses.append(float(loss.value.detach()))
    assert losses[-1] < 0.9 * losses[0]
    head.save(network, tmp_path, FACTS, {})
    assert AcceptanceHead.load(tmp_path / FILE).hidden_size == 128
    assert not any(name.startswith("_draft") for name in network.state_dict())


def test_a_head_without_its_draft_model_is_refused():
    with pytest.raises(UserError, match="give draft=PATH"):
        AcceptanceTraining().on_records(None)
