"""Static scales in the calibration pass, and candidates and checkpoints that round inputs, keys and values alike."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hasten.accel.activations.hooks import attention_states
from hasten.accel.activations.observers.maximum import Maximum
from hasten.accel.activations.observers.squared_error import SquaredError
from hasten.accel.activations.scales import AttentionScheme
from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.levels.assemble import mixed_output, write_mixed
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.levels.units import layer_levels, make_units
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.search.candidates import ORIGINAL, Candidates
from hasten.accel.compression.search.fitness import KL
from hasten.accel.compression.search.samples import Sample
from hasten.accel.compression.search.sensitivity import SensitivityPass
from hasten.accel.evaluation.divergence import evaluate
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.models import tiny

TOKENS = tiny.tokens(6, 20)
ATTENTION = AttentionScheme("attn_head", queries=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "original", "llama", dtype=torch.bfloat16)


def compressed(source, folder, level, workers=1, quantizer=None, **changes):
    chosen = local.settings(source, folder, quantizer or RoundToNearest(), level=parse_level(level), **changes)
    local.compress(chosen, TOKENS, workers)
    return folder


@pytest.mark.parametrize(
    ("family", "level", "propagate", "observer"),
    [
        ("llama", "fp8_static", "sequential", Maximum()),
        ("mixtral", "w8a8s", "sequential", SquaredError()),
        ("opt", "nvfp4", "quantized", Maximum()),
        ("llama", "w8a8s", "original", SquaredError()),
    ],
)
def test_scales_have_the_same_bytes_for_any_number_of_workers(family, level, propagate, observer, tmp_path):
    source = tiny.save(tmp_path / "original", family, dtype=torch.bfloat16)
    options = {"propagate": propagate, "observer": observer, "attention": ATTENTION}
    folders = [compressed(source, tmp_path / f"{workers}", level, workers, **options) for workers in (1, 3)]
    one, three = map(local.contents, folders)
    assert one == three
    stored = Checkpoint(folders[0])
    name = next(layer.name for layer in Architecture(stored).linears(1))
    assert stored.inputs(name).scheme == parse_level(level).inputs


def inputs_of(folder):
    """Largest magnitude of the inputs of every layer, and of queries, keys and values, where a checkpoint runs."""
    model, found = Architecture(Checkpoint(folder)), {}

    def note(name, value):
        found[name] = max(found.get(name, 0.0), float(value.abs().max()))

    parts = [model.embed(part) for chunk in TOKENS.tensor_split(6) for part in chunk.split(2)]
    for index in range(model.num_blocks):
        block = model.load_block(index)
        for layer in model.linears(index):
            block.get_submodule(layer.module).register_forward_pre_hook(
                lambda _, inputs, name=layer.name: note(name, inputs[0]), prepend=True
            )

        def observe(*states, index=index):
            for name, state in zip("qkv", states, strict=True):
                note(f"{index}.{name}", state)

        attention_states(block).observe = observe
        parts = [model.run_block(block, index, part) for part in parts]
    return found


def test_static_scales_are_of_the_inputs_of_the_model_that_is_written(source, tmp_path):
    """Inputs of every layer, with all rounding before it: of weights, inputs, keys, values and queries."""
    folder = compressed(source, tmp_path / "out", "fp8_static", attention=AttentionScheme(queries=True))
    found = inputs_of(folder)
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    for name in (layer.name for block in (0, 1) for layer in Architecture(Checkpoint(folder)).linears(block)):
        scale = stored[f"{name}.input_scale"]
        assert scale.dtype == torch.bfloat16
        assert scale.tolist() == torch.tensor([found[name] / 448]).bfloat16().tolist(), name
    for block in (0, 1):
        for part in "qkv":
            (scale,) = stored[f"model.layers.{block}.self_attn.{part}_scale"].tolist()
            assert scale == float(torch.tensor(found[f"{block}.{part}"] / 448).bfloat16())


@pytest.mark.parametrize("propagate", ["sequential", "quantized"])
def test_a_run_that_was_stopped_between_blocks_ends_with_the_same_bytes(source, tmp_path, propagate):
    options = {"propagate": propagate, "attention": AttentionScheme()}
    whole = local.contents(compressed(source, tmp_path / "out", "w8a8s", **options))
    output = Task(
        local.settings(source, tmp_path / "out", RoundToNearest(), level=parse_level("w8a8s"), **options)
    ).output
    output.shard(1).unlink()
    (tmp_path / "out" / "config.json").unlink()
    assert local.contents(compressed(source, tmp_path / "out", "w8a8s", **options)) == whole


def test_experts_share_the_scales_that_servers_fuse(tmp_path):
    source = tiny.save(tmp_path / "original", "mixtral", dtype=torch.bfloat16)
    stored = Checkpoint(compressed(source, tmp_path / "out", "fp8_static"))
    experts = [layer for layer in Architecture(stored).linears(1) if layer.expert is not None]
    for leaf in ("w1", "w2", "w3"):
        scales = {float(stored.inputs(layer.name).scale) for layer in experts if layer.name.endswith(leaf)}
        assert len(scales) == 1


LEVELS = tuple(parse_level(name) for name in ("w8a8s", "fp8", "nvfp4", "w4g32"))


@pytest.fixture(scope="module")
def database(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("database") / "levels"
    chosen = local.settings(
        source, folder, RoundToNearest(), levels=LEVELS, level=LEVELS[0], attention=AttentionScheme("attn_head")
    )
    local.compress(chosen, TOKENS)
    architecture = Architecture(Checkpoint(source), as_served=False)
    return architecture, LevelDatabase.read(folder, architecture)


def test_databases_have_the_same_bytes_for_any_number_of_workers(source, database, tmp_path):
    chosen = local.settings(
        source,
        tmp_path / "levels",
        RoundToNearest(),
        levels=LEVELS,
        level=LEVELS[0],
        attention=AttentionScheme("attn_head"),
    )
    local.compress(chosen, TOKENS, 3)
    assert local.contents(tmp_path / "levels") == local.contents(database[1].path)


def test_a_candidates_fitness_is_the_divergence_of_the_checkpoint_that_is_written(database, tmp_path):
    architecture, levels = database
    units = make_units(levels, "serving")
    genome = tuple(place % len(unit.choices) for place, unit in enumerate(units))
    assignment = {unit.name: unit.choices[choice].level for unit, choice in zip(units, genome, strict=True)}
    output = mixed_output(architecture, levels, layer_levels(units, assignment), tmp_path / "out")
    output.open({}, overwrite=False)
    write_mixed(output, levels, layer_levels(units, assignment))
    written = Architecture(Checkpoint(tmp_path / "out"))
    sums = evaluate(written, TOKENS, Architecture(Checkpoint(output.source)))
    expected = sums.kl / sums.compared
    sample = Sample(tuple((number, TOKENS.shape[1]) for number in range(len(TOKENS))))

    def kl(genome, stored):
        candidates = Candidates(architecture, units, levels.weight, TOKENS, KL(), stored=stored)
        # The other genomes leave layers as they are before and after it.
        return candidates.evaluate([(ORIGINAL,) * len(units), genome, (0,) * len(units)], sample)

    cache_alone, found, _ = kl(genome, levels)
    # A product that differs in its last bit may be rounded to another code.
    assert found == pytest.approx(expected, rel=2e-2)
    unrounded, without, _ = kl(genome, None)
    assert without < 0.9 * expected
    # With the original's weights, keys and values are still rounded.
    assert unrounded == pytest.approx(0, abs=1e-9)
    assert cache_alone > 1e-6
    # The parts that the gradient gives to the layers, whose inputs are rounded, are most of the divergence.
    (result,) = SensitivityPass(architecture, units, levels.weight, TOKENS, stored=levels).measure(genome, [range(6)])
    assert result.divergence / result.tokens == pytest.approx(expected, rel=2e-2)
    weights_only = SensitivityPass(architecture, units, levels.weight, TOKENS).measure(genome, [range(6)])[0]
    assert float(result.parts.nansum()) > float(weights_only.parts.nansum())


def test_an_attention_without_levels_is_calibrated_in_skipped_blocks(source, tmp_path):
    folder = compressed(source, tmp_path / "out", "w4g32", skip_first=1, attention=AttentionScheme())
    stored = Checkpoint(folder)
    for block in (0, 1):
        roundings = stored.attention(f"model.layers.{block}.self_attn", ["LlamaAttention"])
        assert sorted(roundings) == ["k", "v"]
    changed = replace(ATTENTION, queries=False)
    assert changed.names == ("k_scale", "v_scale")
