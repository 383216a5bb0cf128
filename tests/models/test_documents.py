"""Documents that share a sequence have the hidden states that each of them has alone."""

import pytest
import torch
from torch import nn

from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.documents import check_masks, positions_of
from hasten.accel.models.skeleton import Call
from tests.compression import local
from tests.models import tiny

# The first is longer than the window of sliding attention.
LENGTHS = (11, 4, 9)


def packed(tokens: torch.Tensor) -> torch.Tensor:
    """Sequences (B, T) as documents of LENGTHS, of the second sequence in another order."""
    orders = (LENGTHS, LENGTHS[::-1])
    numbers = [torch.arange(len(order)).repeat_interleave(torch.tensor(order)) for order in orders[: len(tokens)]]
    return torch.stack([tokens, torch.stack(numbers)], 1)


def outputs(architecture: Architecture, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden = architecture.embed(tokens)
        for index in range(architecture.num_blocks):
            hidden = architecture.run_block(architecture.load_block(index), index, hidden)
    return hidden


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES.keys() - {"opt"}))
def test_packed_documents_have_the_hidden_states_that_they_have_alone(family, checkpoints):
    architecture = Architecture(Checkpoint(checkpoints(family)))
    tokens = tiny.tokens()
    found = outputs(architecture, packed(tokens))
    stream = outputs(architecture, tokens)
    assert not torch.allclose(found[:, -1], stream[:, -1], atol=1e-3)
    for row, order in enumerate((LENGTHS, LENGTHS[::-1])):
        for document, states in zip(tokens[row].split(order), found[row].split(order), strict=True):
            # Products of other sizes sum in another order.
            torch.testing.assert_close(states, outputs(architecture, document[None])[0], rtol=1e-4, atol=1e-4)


def test_a_model_whose_mask_ignores_positions_is_refused(checkpoints):
    architecture = Architecture(Checkpoint(checkpoints("opt")))
    with pytest.raises(UserError, match=r"block 0 of .* mixes positions"):
        architecture.check_packing()
    with pytest.raises(UserError, match=r"packing=stream"):
        outputs(architecture, packed(tiny.tokens()))


def test_one_document_a_sequence_is_as_if_it_were_not_packed(checkpoints):
    architecture = Architecture(Checkpoint(checkpoints("llama")))
    tokens = tiny.tokens()
    whole = torch.stack([tokens, torch.zeros_like(tokens)], 1)
    assert torch.equal(outputs(architecture, whole), outputs(architecture, tokens))


def test_positions_begin_anew_with_each_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    assert positions_of(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


def test_blocks_without_a_mask_between_documents_are_refused():
    documents = torch.tensor([[0, 0, 1, 1]])
    apart = documents[:, None, :, None] == documents[:, None, None, :]
    plain, state_space = nn.Linear(1, 1), nn.Sequential(nn.Conv1d(1, 1, 2))
    call = Call((), {"attention_mask": apart})
    check_masks([plain], [call], documents, "model")
    check_masks([plain], [Call((torch.where(apart, 0.0, -torch.inf),), {})], documents, "model")
    check_masks([state_space], [Call((), {})], torch.zeros(1, 4, dtype=torch.long), "model")
    wrong = [
        (plain, {}),
        (plain, {"attention_mask": None}),
        (plain, {"attention_mask": torch.ones(1, 4)}),
        (plain, {"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()}),
        (state_space, {"attention_mask": apart}),
    ]
    for block, named in wrong:
        with pytest.raises(UserError, match=r"block 1 of model mixes positions .*packing=stream"):
            check_masks([plain, block], [call, Call((), named)], documents, "model")


@pytest.mark.parametrize("propagate", ["sequential", "original"])
def test_a_calibration_on_packed_documents_is_one_on_the_documents(propagate, checkpoints, tmp_path):
    """The same Hessians, and so the same errors, whichever documents share a sequence."""
    source = checkpoints("qwen3")
    tokens = tiny.tokens(4, 12)
    alone = torch.stack([tokens, torch.zeros_like(tokens)], 1)
    halves = tokens.reshape(2, 24)
    numbers = torch.arange(2).repeat_interleave(12).expand_as(halves)
    together = torch.stack([halves, numbers], 1)
    facts = {}
    for name, given in (("alone", alone), ("together", together), ("stream", halves)):
        chosen = local.settings(source, tmp_path / name, propagate=propagate)
        facts[name] = [row["error"] for row in local.compress(chosen, given)]
    # Behind compressed layers, sums in another order may round a code otherwise.
    tolerance = 1e-3 if propagate == "original" else 0.1
    assert facts["together"] == pytest.approx(facts["alone"], rel=tolerance)
    assert facts["stream"] != pytest.approx(facts["alone"], rel=tolerance)
