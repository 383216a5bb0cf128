"""Hidden transfer: pseudo states enter in the middle of the target, as maps of the last token's state there."""

import pytest
import torch

from hasten.accel.decoding.targets.virtual import entering
from hasten.accel.errors import UserError
from hasten.accel.training.heads.hidden_transfer import HiddenTransfer
from hasten.accel.training.heads.vocabulary import DraftVocabulary
from tests.decoding.drafters.heads.untrained import network_of
from tests.training.heads.test_draft_heads import FACTS, batch_of


@pytest.mark.parametrize("enter", [(1, 2, 3), (2, 2, 2)])
@torch.no_grad()
def test_drafts_are_those_of_a_sequence_whose_last_states_are_replaced_in_the_middle(enter):
    head = HiddenTransfer(enter=enter)
    network = network_of(head).eval()
    batch, last = batch_of(head), 4
    model = network.frozen.model
    # The tokens up to `last`, and three more of any ids, whose states are replaced.
    ids = torch.cat([batch.tokens[:1, : last + 1], torch.tensor([[7, 7, 7]])], 1)

    def replaced(layer, hidden):
        changed = hidden.clone()
        for position, enters in enumerate(enter):
            if enters == layer:
                changed[0, last + 1 + position] = network.maps[position](hidden[0, last])
        return changed

    changes = {layer: lambda hidden, layer=layer: replaced(layer, hidden) for layer in set(enter)}
    with entering(model.model.layers, changes):
        expected = model(ids).logits[0, last + 1 :]
    found = network.logits(batch, torch.tensor([[last], [0]]))[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("enter", [(3, 2, 1), (1, 2)])
def test_pseudo_states_that_would_read_those_below_their_layers_are_refused(enter):
    with pytest.raises(UserError, match="in ascending order"):
        HiddenTransfer(enter=enter)


def test_layers_that_the_target_lacks_are_refused():
    with pytest.raises(UserError, match="numbers from 0 to 3"):
        HiddenTransfer(enter=(1, 2, 4)).build(FACTS, DraftVocabulary.full(FACTS.vocabulary))
