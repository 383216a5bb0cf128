"""Passes whose attention runs as kernels, against transformers' own: on a GPU, or in Triton's interpreter."""

import torch

from hasten.accel.decoding.targets.families import build_decoder
from hasten.accel.decoding.targets.families.weights import ModelWeights
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.tree import ROOT
from tests.models.tiny import WINDOW, build

# The prompts are longer than a window of Gemma, one of them is prefilled in several passes.
PROMPTS = [[5, 17, 3, 60, 22, 9, 41, 8, 77, 30, 2, 54], [7, 8, 9]]
CHUNK = 9
# Of one layer: programs are slow in the interpreter.
MODELS = {
    "llama": {"num_hidden_layers": 1},
    "gemma3_text": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
    "gemma2": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
}
assert len(PROMPTS[0]) > CHUNK > WINDOW


def again(function):
    """A Capture, see graphs.py, that calls the function again, which may depend on nothing but its inputs."""
    outputs = function()

    def replay():
        for output, new in zip(outputs, function(), strict=True):
            output.copy_(new)

    return replay, outputs


def passes(target):
    """Logits of the new nodes of a few passes: of single tokens, and of trees that grow and have unequal sizes."""
    target.reserve(3, 40)
    for slot, prompt in zip((2, 0), PROMPTS, strict=True):
        target.prefill(slot, prompt, CHUNK)
    rows = [target.forward([2], [[11]], [[ROOT]]).logits[0]]
    target.commit(2, [0])
    for token in (12, 61):
        first = target.forward([2, 0], [[token, 13, 14, 15, 16], [21, 22]], [[ROOT, 0, 0, 1, 2], [ROOT, ROOT]]).logits
        second = target.forward([2, 0], [[17], [23, 24]], [[4], [1, 2]]).logits
        rows += [first[0], first[1, :2], second[0, :1], second[1]]
        target.commit(2, [0, 2, 4, 5])
        target.commit(0, [1, 2])
    return rows


def check(family, dtype, device, tolerance, capture=again):
    """Logits of plain and of recorded passes by kernels equal those of transformers."""
    model = build(family, **MODELS[family]).to(device, dtype)
    expected = passes(TransformersTarget(model))
    decoder = build_decoder(model.config, ModelWeights(model, packs=False))
    plain, recorded = FastTarget(decoder), FastTarget(decoder, compiled=True, capture=capture)
    for target in (plain, recorded):
        assert target._by_kernels
        for found, rows in zip(passes(target), expected, strict=True):
            torch.testing.assert_close(found, rows, atol=tolerance, rtol=tolerance)
    # Single tokens, trees, and what they grow by: each is recorded once.
    assert len(recorded._recorded) == 3
