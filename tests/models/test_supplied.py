"""Blocks whose experts are read when they run give the results of blocks that hold them, bit for bit."""

import gc
import weakref
from functools import partial

import pytest
import torch

from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.forwards import Forward
from tests.models import tiny
from tests.models.block_runs import at_once, in_stages

TOKENS = tiny.tokens(batch=5)
CHUNKS = {0: TOKENS[:2], 1: TOKENS[2:3], 2: TOKENS[3:]}
MIXTURES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request, tmp_path_factory):
    changes = {"decoder_sparse_step": 1} if request.param == "qwen3_moe" else {}
    return tiny.save(tmp_path_factory.mktemp(request.param) / "m", request.param, **changes)


def experts_of(model):
    return [layer for layer in model.linears(0) if layer.expert is not None]


@pytest.mark.parametrize("all_experts", [False, True])
@pytest.mark.parametrize("run", [in_stages, at_once])
def test_sums_and_states_are_those_of_a_block_that_holds_its_experts(folder, run, all_experts):
    model = Architecture(Checkpoint(folder))
    model.all_experts = all_experts
    expected, states = run(model, folder, CHUNKS)
    found, hidden = run(model, folder, CHUNKS, stream=True)
    assert found == expected
    assert hidden.keys() == states.keys()
    assert all(torch.equal(hidden[number], states[number]) for number in states)


def test_an_expert_is_read_once_for_all_forwards_and_is_not_held(folder, monkeypatch):
    model = Architecture(Checkpoint(folder))
    block = model.stream_block(0)
    names = [f"{layer.name}.weight" for layer in experts_of(model)]
    read, read_one = [], model._read
    monkeypatch.setattr(model, "_read", lambda name: read.append(name) or read_one(name))
    streamed = model._streamed[block]
    for layer in experts_of(model):
        streamed.replace(layer.module, partial(model._read, f"{layer.name}.weight"))
    hidden = model.embed(TOKENS)
    forwards = [Forward(partial(model.run_block, block, 0, part)) for part in hidden.split(1)]
    model.run_forwards(block, forwards)
    assert read
    assert read == [name for name in names if name in read]
    assert not any(block.get_submodule(layer.module).weight.numel() for layer in experts_of(model))
    whole = model.load_block(0)
    outputs = [forward.output for forward in forwards]
    assert all(map(torch.equal, outputs, [model.run_block(whole, 0, part) for part in hidden.split(1)]))


def test_a_block_also_runs_alone_with_weights_that_were_replaced(folder):
    model = Architecture(Checkpoint(folder))
    whole, block, hidden = model.load_block(0), model.stream_block(0), model.embed(TOKENS)
    assert torch.equal(model.run_block(block, 0, hidden), model.run_block(whole, 0, hidden))
    before = model.run_block(whole, 0, hidden)
    layers = model.linears(0)
    weights = [(layer.module, torch.full((layer.rows, layer.columns), 0.01)) for layer in (layers[0], layers[-1])]
    for one in (whole, block):
        model.replace_weights(one, weights)
    after = model.run_block(whole, 0, hidden)
    assert not torch.equal(after, before)
    assert torch.equal(model.run_block(block, 0, hidden), after)
    # Functions are called when the layer runs.
    model.replace_weights(block, [(layers[-1].module, lambda: weights[1][1])])
    assert torch.equal(model.run_block(block, 0, hidden), after)


def test_a_block_is_freed_without_the_garbage_collector(folder):
    model = Architecture(Checkpoint(folder))
    gc.collect()
    gc.disable()
    try:
        block = model.stream_block(0)
        model.run_block(block, 0, model.embed(TOKENS))
        gone = weakref.ref(block)
        del block
        assert gone() is None
    finally:
        gc.enable()
