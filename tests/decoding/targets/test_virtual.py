"""Virtual tokens in a target's pass: they run as nodes, with states of their own, and change no other node."""

import pytest
import torch

from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.targets.virtual import EmbeddedTokens
from hasten.accel.decoding.tree import ROOT, DraftTree, VirtualNodes
from hasten.accel.models.checkpoint import resolve

PROMPTS = [[5, 6, 7, 8], [90, 91]]
# Below the last committed token: a draft of two siblings, of which the second has a child.
TOKENS, PARENTS = [[9, 10, 11, 12], [92, 10, 11, 12]], [ROOT, 0, 0, 2]
# Behind them two tokens below each other, and another one below the root.
BEHIND, BELOW = [700, 701, 702], [3, 4, 0]


@pytest.fixture(scope="module", params=["llama", "transformers"])
def target(request):
    return load_target(resolve("embedded:target"), torch.float32, path=request.param)


def logits_of(target, behind):
    target.reserve(2, 16)
    for slot, prompt in enumerate(PROMPTS):
        target.prefill(slot, prompt)
    tokens = [[*own, *behind] for own in TOKENS]
    return target.forward([0, 1], tokens, [[*PARENTS, *BELOW[: len(behind)]]] * 2).logits


def test_a_virtual_token_with_the_embedding_of_an_id_runs_as_that_id(target):
    target.virtual = None
    expected = logits_of(target, BEHIND)
    target.virtual = EmbeddedTokens(target.embedding()[torch.tensor(BEHIND)])
    found = logits_of(target, [target.vocabulary + number for number in range(3)])
    torch.testing.assert_close(found, expected)


def test_the_draft_does_not_see_virtual_tokens(target):
    target.virtual = None
    expected = logits_of(target, [])
    target.virtual = EmbeddedTokens(torch.randn(3, target.embedding().shape[1], generator=torch.manual_seed(0)))
    found = logits_of(target, [target.vocabulary + number for number in range(3)])
    # Passes of other widths add in another order.
    torch.testing.assert_close(found[:, : len(PARENTS)], expected, rtol=1e-4, atol=1e-4)
    target.commit(0, [0, 2, 3])
    assert target.committed(0) == [*PROMPTS[0], 9, 11, 12]


def test_virtual_nodes_hang_on_a_node_of_the_draft_and_are_cut_by_depth():
    tree = DraftTree([1, 2, 3], [ROOT, ROOT, 0])
    nodes = VirtualNodes(3, numbers=[0, 0, 1, 0, 1], parents=[ROOT, 2, 4, 1, 6])
    assert nodes.anchors == [ROOT, 2, 2, 1, 1]
    assert nodes.on(2) == [1, 2]
    # Depths 1, 3, 4, 2, 3.
    cut = nodes.within(tree, 3)
    assert (cut.numbers, cut.parents) == ([0, 0, 0, 1], [ROOT, 2, 1, 5])
    assert len(nodes.within(tree, 1)) == 1
