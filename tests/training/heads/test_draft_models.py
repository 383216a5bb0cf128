"""What distilled draft models must do: drafts in use are those of training, and what is saved is a checkpoint."""

import pickle
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.drafters.model.s2d import SortedDrafting
from hasten.accel.decoding.replay import replay
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import Checkpoint, resolve
from hasten.accel.training.heads.draft_head import HeadBatch, TargetFacts, TargetWeights
from hasten.accel.training.heads.draft_model import OBJECTIVES, DistilledDraft
from hasten.accel.training.heads.s2d import SortedDraft
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from tests.training.heads.test_draft_heads import batch_of, losses_of_steps

FOLDER = resolve("embedded:target")
FACTS, WEIGHTS = TargetFacts.of(FOLDER), TargetWeights.of(FOLDER)


def made(head, seed=0):
    """An untrained network that began from the target."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = head.build(FACTS, DraftVocabulary.full(8))
    head.initialise(network, WEIGHTS)
    network.attach(WEIGHTS.embedding)
    return network


@pytest.fixture(params=[*OBJECTIVES, "s2d"])
def head(request):
    return SortedDraft() if request.param == "s2d" else DistilledDraft(objective=request.param)


def test_training_lowers_the_loss_and_reaches_every_parameter(head):
    losses = losses_of_steps(head, made(head), batch_of(head), 4)
    # Reverse KL has small gradients where the draft says nothing of what the target says, as at the beginning.
    assert losses[-1] < (0.999 if head.objective == "reverse_kl" else 0.95) * losses[0]


def test_a_sorted_draft_learns_in_all_sub_models_and_its_loss_is_their_sum():
    head = SortedDraft(num_layers=2, exits=(1, 2))
    loss = head.loss(made(head), batch_of(head))
    torch.testing.assert_close(loss.value.detach(), loss.parts["loss_of_1"] + loss.parts["loss_of_2"])


def test_tokens_that_are_not_learned_and_other_documents_change_no_loss(head):
    network, batch = made(head), batch_of(head, ((5, 7),))
    learned = batch.learned.clone()
    learned[:, :6] = False
    own = HeadBatch(**{**vars(batch), "learned": learned})
    tokens, top = batch.tokens.clone(), batch.top_ids.clone()
    tokens[:, :5] += 1
    top[:, :5] = top[:, :5].flip(-1) + 1
    other = HeadBatch(**{**vars(own), "tokens": tokens % FACTS.vocabulary, "top_ids": top})
    with torch.no_grad():
        torch.testing.assert_close(head.loss(network, own).value, head.loss(network, other).value)


def test_what_is_saved_is_a_checkpoint_with_the_logits_of_training_and_the_targets_tokenizer(tmp_path):
    head = DistilledDraft(depth=2)
    network, batch = made(head), batch_of(head)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as stored
    head.save(network, tmp_path, FACTS, {"rates": [[0.5]]})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(batch.tokens).logits
        first, second = head.teacher_forced(network, batch)
    # After token t + 1 the token t + 2 is the draft of depth 1.
    torch.testing.assert_close(first, expected[:, 1:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, expected[:, 2:-1], rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(FOLDER).get_vocab()
    assert Checkpoint(tmp_path).fingerprint()


@pytest.mark.parametrize(("head", "drafter"), [(DistilledDraft(), DraftModel()), (SortedDraft(), SortedDrafting())])
def test_acceptance_is_measured_on_the_network_as_it_is(head, drafter):
    network = made(head)
    memory = head.drafter_memory(network)
    tokens = torch.arange(30, 50)
    with torch.no_grad():
        said = int(network.model(tokens[None]).logits[0, -1].argmax())
        tree = replace(drafter, **({"confidence": 1.0} if head.drafter == "s2d" else {})).propose(
            Context.start(tokens.tolist()), memory, 1
        )
        [stats] = replay(drafter, memory, [(tokens.tolist(), 4)], 4)
    assert list(tree.tokens) == [said]
    assert stats.num_draft_tokens > 0


def test_layers_of_the_target_are_copied_as_they_are():
    head = DistilledDraft(share=1.0, num_layers=4, from_layers=(0, 1, 2, 3))
    batch = batch_of(head)
    [states] = made(head).states(batch)
    target = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        expected = target.model(batch.tokens).last_hidden_state
    torch.testing.assert_close(states.detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_narrower_draft_begins_with_the_projection_that_keeps_most_of_the_embedding():
    weight = made(DistilledDraft()).model.model.embed_tokens.weight.detach()
    kept = float(weight.square().sum() / WEIGHTS.embedding.square().sum())
    values = torch.linalg.svdvals(WEIGHTS.embedding).square()
    assert kept == pytest.approx(float(values[: weight.shape[1]].sum() / values.sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"objective": "mse"}, "objective=mse is wrong: expected one of forward_kl"),
        ({"share": 0.0}, "share=0.0 is wrong"),
        ({"from_layers": (0, 1, 2)}, "at most num_layers=2"),
    ],
)
def test_wrong_hyper_parameters_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        DistilledDraft(**wrong)


@pytest.mark.parametrize("exits", [(1, 2), (2, 1, 3), (0, 3), ()])
def test_sub_models_that_do_not_end_with_the_whole_one_are_refused(exits):
    with pytest.raises(UserError, match="exits="):
        SortedDraft(exits=exits)


def test_sizes_and_layers_that_do_not_fit_the_target_are_refused():
    with pytest.raises(UserError, match="hidden_size=100 is wrong: expected a multiple of the target's head size 64"):
        DistilledDraft(hidden_size=100).build(FACTS, DraftVocabulary.full(8))
    with pytest.raises(UserError, match="give share=1"):
        made(DistilledDraft(from_layers=(0,)))
    with pytest.raises(UserError, match="the target has no layer 9"):
        made(DistilledDraft(share=1.0, from_layers=(9,)))


def test_a_head_is_pickled(head):
    assert pickle.loads(pickle.dumps(head)) == head
