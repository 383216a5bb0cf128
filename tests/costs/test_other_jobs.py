"""Costs of decoding, evaluation, search and training, compared with the real objects and for various options."""

from dataclasses import replace
from math import prod

import pytest
import torch

from hasten.accel.compression.allocators.exact import Exact
from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.search.evopress import EvoPress
from hasten.accel.compression.search.random_search import RandomSearch
from hasten.accel.costs import decoding, evaluation, search
from hasten.accel.costs.model import Model
from hasten.accel.costs.training import Training, pretrain
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.training.pretraining import Shape, build
from tests.compression.local import compress, settings
from tests.costs.rates import RATES
from tests.models import tiny


def decoded(model, **changes):
    values = {"prompts": 4, "prompt_tokens": 8.0, "longest": 24, "new_tokens": 8, "drafted": 7, "in_flight": 3}
    return decoding.estimate(decoding.Decoding(model, **(values | changes)), RATES)


@pytest.mark.parametrize("path", ["llama", "transformers"])
def test_caches_are_planned_to_the_byte(folder, model, path):
    target = load_target(folder, torch.float32, path=path)
    target.reserve(3, 24 + 8)
    target.forward([0, 1, 2], [[1], [2], [3]], [[-1], [-1], [-1]])
    verifier = decoded(model).processes[0]
    assert verifier.host["decode"]["caches"] == target.cache_bytes
    assert target.token_bytes == model.token_bytes


def test_weights_of_two_bytes_are_planned_as_the_target_keeps_them(folder, model):
    target = load_target(folder, torch.float32)
    layers = target._decoder.layers
    kept = [target._decoder.head]
    for layer in layers:
        kept += [layer.qkv, layer.out, layer.mlp._gate_up, layer.mlp._down]
    if kept[0]._panels is None:
        pytest.skip("there is no C compiler")
    held = target.embedding().nbytes + sum(weight._panels.nbytes for weight in kept)
    norms = 2 * (2 * len(layers) + 1) * model.hidden
    assert decoded(model).processes[0].host["decode"]["weights"] == held + norms


def test_quantized_weights_are_planned_packed(folder, tmp_path):
    compress(settings(folder, tmp_path / "out", RoundToNearest(), scheme=Scheme(4, 32, symmetric=True)), tiny.tokens(1))
    checkpoint = Checkpoint(tmp_path / "out")
    compressed = Model(Architecture(checkpoint), torch.float32)
    plain = [name for name in checkpoint.names if not checkpoint.is_packed(name)]
    held = sum(checkpoint.stored_bytes(name) for name in checkpoint.names if checkpoint.is_packed(name))
    # bfloat16 weights are kept as stored; the embedding is not tied to the head.
    held += 2 * sum(prod(checkpoint.shape(name)) for name in plain)
    process = decoded(compressed).processes[0]
    assert process.host["decode"]["weights"] == pytest.approx(held, rel=1e-3)
    assert process.host["load"]["model as it is loaded"] == max(map(checkpoint.stored_bytes, checkpoint.names))
    through_transformers = decoded(compressed, fast=False).processes[0].host["decode"]["weights"]
    assert through_transformers == 4 * sum(prod(checkpoint.shape(name)) for name in checkpoint.names)


def test_a_search_stores_the_original_for_the_sequences_that_it_uses(model):
    def predictions(*allocators, measured=3):
        one = search.Search(model, 64, 16, 8, 5, measured, allocators, 1, original_bytes=100)
        return search.estimate(one, RATES).processes[0].host["search"]["original's predictions"]

    assert predictions(Exact(), EvoPress()) == 64 * 16 * 100
    assert predictions(Exact()) == 8 * 16 * 100
    assert predictions(Exact(), measured=0) == 0


def test_a_searcher_says_itself_how_many_tokens_it_measures(model):
    def seconds(searcher):
        asked = search.Search(model, 64, 16, 8, 5, 0, (searcher,), 1, original_bytes=100)
        return search.estimate(asked, RATES).steps[0].seconds

    assert seconds(EvoPress(generations=60)) > seconds(EvoPress(generations=30))
    random = RandomSearch(rounds=1, candidates=100, tokens=1024)
    assert seconds(random) == seconds(replace(random, rounds=100, candidates=1)) > seconds(replace(random, tokens=512))


@pytest.mark.parametrize("batch", [1, 3])
def test_sensitivities_hold_the_states_of_a_batch_where_the_bound_is_smaller(model, batch, monkeypatch):
    def states(**changes):
        asked = search.Search(model, 64, 16, 8, 5, 0, (Exact(),), 1, original_bytes=100, batch=batch, **changes)
        return search.estimate(asked, RATES).processes[0].host["search"]["hidden states"]

    of_sequence = model.hidden_bytes(1, 16) * (model.blocks + 2)
    assert states(error_passes=2) == 4 * of_sequence
    monkeypatch.setattr(search, "STATES_BYTES", of_sequence // 2)
    assert states(error_passes=2) == batch * of_sequence
    assert states() == batch * model.hidden_bytes(1, 16) * (model.blocks + 1)


def test_a_bound_on_memory_cuts_caches_and_logits(model):
    free, bound = (decoded(model, memory_bytes=limit).processes[0].host["decode"] for limit in (None, 10_000))
    assert free["caches"] + free["logits"] > 10_000 >= bound["caches"] + bound["logits"]
    assert bound["weights"] == free["weights"]


def test_drafts_save_passes_and_take_a_model(model):
    plain = decoded(model, draft=None, drafted=0, new_tokens=64)
    drafting = decoded(model, draft=model, tokens_per_pass=2.0, new_tokens=64)
    assert "draft model" in drafting.processes[0].host["decode"]
    assert "draft model" not in plain.processes[0].host["decode"]
    seconds = [
        {step.name: step.seconds for step in found.steps}
        for found in (plain, decoded(model, drafted=0, tokens_per_pass=2.0, new_tokens=64))
    ]
    assert seconds[0]["decode"] > seconds[1]["decode"]


def test_an_evaluation_holds_the_states_of_both_models(model):
    windows = evaluation.Windows(8, 16)
    one, both = (
        evaluation.estimate(model, windows, RATES, original=original, workers=2).processes[0]
        for original in (None, model)
    )
    assert one.host["run"]["hidden states"] == 4 * 16 * 64 * 4
    assert both.host["run"]["hidden states"] == 2 * one.host["run"]["hidden states"]
    assert evaluation.estimate(model, evaluation.Windows(0, 16), RATES).processes == ()


def test_a_model_in_training_has_the_parameters_that_it_is_built_with():
    shape = Shape(32, 48, 3, 4, 2, head_dim=8)
    training = Training("target", 32, 48, 32, 16, 96, [(1, 64), (3, 128)], batch=4, length=16)
    built = sum(parameter.numel() for parameter in build(shape, 3, 96).parameters())
    assert training.elements(3) == built
    found = pretrain([training], workers=2, threads=1, rates=RATES)
    assert found.written["target checkpoint"] == 2 * built
    # Gradients of all parameters go to the other process and back, at each of 1 + 2 steps of 64 tokens.
    assert found.moved["target gradients"] == 3 * 2 * 4 * built
