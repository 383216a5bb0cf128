"""Recorded passes: the same as plain ones, whatever was recorded; in tests/gpu with CUDA graphs, here with a tape."""

import pytest
import torch

from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets import matmul
from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.decoding.targets.families import build_decoder
from hasten.accel.decoding.targets.families.weights import ModelWeights
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.graphs import TREE_SIZES, tree_size
from hasten.accel.decoding.tree import ROOT
from hasten.kernels.rms_norm import reference
from tests.decoding.targets.tape import tape
from tests.models.tiny import build

# Of more rows, and of masked positions, sums run in another order: a few roundings of logits of size 10.
TOLERANCE = 2e-4
PROMPTS = [[5, 17, 3, 60, 22, 9, 41, 8, 77, 30, 2, 54], [7, 8, 9, 4]]
TREES = [([11, 12, 13, 14, 15], [ROOT, 0, 0, 1, 2]), ([21, 22, 23], [ROOT, 0, ROOT])]


@pytest.fixture(autouse=True)
def torch_norms(monkeypatch):
    """The tape records torch's operations; on a GPU the norms are such."""
    monkeypatch.setattr(matmul, "rms_norm", reference.rms_norm)


def made(family):
    """A plain target, and one whose passes are recorded; not with the kernels of packed weights, which have no tape."""
    model = build(family)
    decoder = build_decoder(model.config, ModelWeights(model, packs=False))
    return FastTarget(decoder), FastTarget(decoder, compiled=True, capture=tape)


def passes(target):
    """Passes over trees of one and of two sequences, with commits between them; of the nodes of every sequence."""
    target.reserve(2, 40)
    for slot, prompt in enumerate(PROMPTS):
        target.prefill(slot, prompt)
    done = _nodes(target, [0, 1], TREES)
    target.commit(0, [0, 2, 4])
    target.commit(1, [])
    done += _nodes(target, [0, 1], TREES[::-1])
    target.commit(0, [0])
    target.commit(1, [0, 1])
    for number in range(3):
        for slot in (0, 1):
            done += _nodes(target, [slot], [([30 + number], [ROOT])])
            target.commit(slot, [0])
    return done


def _nodes(target, slots, trees):
    """Logits, hidden states and features of the nodes of each tree."""
    rows = target.forward(slots, *zip(*trees, strict=True))
    parts = [part for part in (rows.logits, rows.hidden, rows.features) if part is not None]
    return [part[row, : len(tree[0])] for row, tree in enumerate(trees) for part in parts]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("feature_layers", [(), (1, FINAL)])
def test_recorded_passes_are_plain_ones(family, feature_layers):
    plain, recorded = made(family)
    outputs = []
    for target in (plain, recorded):
        target.feature_layers = feature_layers
        outputs.append(passes(target))
    # Trees of 5 nodes are padded to 6, and both passes over two sequences are one recording; single tokens are one
    # for each slot. Later replays have not changed what earlier ones returned.
    assert len(recorded._recorded) == 3
    assert len(outputs[0]) == 10 * (3 if feature_layers else 2)
    for expected, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_new_caches_are_recorded_anew():
    plain, recorded = made("llama")
    for _ in range(2):
        expected, found = passes(plain)[-2], passes(recorded)[-2]
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
        recorded.reserve(2, 40)
        assert len(recorded._recorded) == 0


def test_a_tree_that_does_not_fit_padded_is_not_recorded():
    plain, recorded = made("llama")
    outputs = []
    for target in (plain, recorded):
        target.reserve(1, len(PROMPTS[0]) + 5)
        target.prefill(0, PROMPTS[0])
        outputs.append(target.forward([0], [TREES[0][0]], [TREES[0][1]]).logits)
    assert len(recorded._recorded) == 0
    assert torch.equal(*outputs)


def test_decoding_is_the_same_and_records_few_passes():
    tokens = []
    for target in made("mistral"):
        engine = Engine(target, policy=Fixed(0), in_flight=2)
        results = engine.decode([Request(str(row), prompt, 20) for row, prompt in enumerate(PROMPTS)])
        tokens.append({result.id: result.token_ids for result in results})
    assert tokens[0] == tokens[1]
    assert len(target._recorded) == 1


def test_mixtures_are_not_recorded():
    _, recorded = made("mixtral")
    assert recorded._recorded is None
    with pytest.raises(AssertionError, match="bincount"):
        tape(lambda: recorded._decoder.layers[0].mlp(torch.ones(2, 64)))


def test_sizes_of_trees_are_rounded_up():
    assert [tree_size(nodes) for nodes in (1, 5, 17, TREE_SIZES[-1], TREE_SIZES[-1] + 1)] == [1, 6, 24, 128, None]
