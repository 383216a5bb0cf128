"""Checkpoints whose config rounds inputs, keys, values and queries: our blocks compute what transformers does."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hasten.accel.activations.description import described
from hasten.accel.activations.hooks import attention_states
from hasten.accel.activations.scales import STRATEGIES, AttentionScheme
from hasten.accel.activations.scheme import InputScheme
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.activations.schemes import SCHEMES
from tests.models import tiny
from tests.models.conftest import FOUR_BITS

# One scheme of 64 columns needs groups that divide it.
INPUTS = {name: scheme for name, scheme in SCHEMES.items() if scheme.group_size != 128 and "asymmetric" not in name}
INPUTS["fp8 group"] = InputScheme("float", 8, "group", 64)


def rounded(folder, source, scheme=None, attention=None):
    """The checkpoint in 4 bits whose layers round their inputs, and whose attentions their states."""
    group = {"targets": ["Linear"], "weights": FOUR_BITS}
    if scheme is not None:
        group["input_activations"] = described(scheme)
    tiny.save_packed(folder, source, [group], ignore=["lm_head"])
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        layer = name.removesuffix(".weight_packed")
        if scheme is not None and scheme.static:
            tensors[f"{layer}.input_scale"] = torch.tensor([0.02])
        if scheme is not None and scheme.strategy == "tensor_group":
            tensors[f"{layer}.input_global_scale"] = torch.tensor([900.0])
    if attention is not None:
        heads = {
            "q": config["num_attention_heads"],
            "k": config["num_key_value_heads"],
            "v": config["num_key_value_heads"],
        }
        for block in range(config["num_hidden_layers"]):
            for part in attention.names:
                by_head = torch.linspace(0.002, 0.02, heads[part[0]])[:, None, None]
                scale = by_head if attention.strategy == "attn_head" else torch.tensor([0.01])
                tensors[f"model.layers.{block}.self_attn.{part}"] = scale
        section["kv_cache_scheme"] = described(attention.states)
        if attention.queries:
            section["config_groups"]["attention"] = {
                "targets": ["LlamaAttention"],
                "input_activations": described(attention.states),
            }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(folder):
    model = Architecture(Checkpoint(folder))
    hidden = model.embed(tiny.tokens())
    for block in range(model.num_blocks):
        hidden = model.run_block(model.load_block(block), block, hidden)
    return model.head(hidden)


def check(folder, plain):
    """Logits are those of transformers, and differ from those without rounding."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model(tiny.tokens(), use_cache=False).logits
    found = logits(folder)
    # A product that differs in its last bit may be rounded to another code.
    error = (found - expected).square().mean() / expected.square().mean()
    assert error < 1e-6, error
    assert (found - plain).square().mean() / plain.square().mean() > 1e-6


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints("llama")


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    return logits(rounded(tmp_path_factory.mktemp("plain") / "model", source))


@pytest.mark.parametrize("name", INPUTS, ids=lambda name: name.replace(" ", "_"))
def test_layers_round_their_inputs_as_transformers_does(name, source, plain, tmp_path):
    check(rounded(tmp_path / "model", source, INPUTS[name]), plain)


@pytest.mark.parametrize("queries", [False, True], ids=["cache", "attention"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_attentions_round_keys_and_values_as_transformers_does(strategy, queries, source, plain, tmp_path):
    check(rounded(tmp_path / "model", source, attention=AttentionScheme(strategy, queries)), plain)


def test_attentions_round_where_the_loader_is_registered(source, plain, tmp_path):
    importlib.import_module("hasten.accel.models.transformers_loader")
    check(rounded(tmp_path / "model", source, attention=AttentionScheme()), plain)


def test_missing_scales_are_named(source, tmp_path):
    folder = rounded(tmp_path / "model", source, attention=AttentionScheme())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.v_scale is missing"):
        logits(folder)


def test_rounded_outputs_are_refused(source, tmp_path):
    folder = rounded(tmp_path / "model", source)
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["output_activations"] = described(SCHEMES["fp8 tensor static"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has output_activations: only inputs can be rounded"):
        logits(folder)


def test_a_cache_in_integers_is_refused(source, tmp_path):
    folder = rounded(tmp_path / "model", source, attention=AttentionScheme())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] |= {"type": "int"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="supported are static FP8 scales"):
        logits(folder)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "qwen3_moe"])
def test_attentions_of_other_families_show_their_states_and_compute_the_same(family, checkpoints):
    model = Architecture(Checkpoint(checkpoints(family)))
    block, hidden, seen = model.load_block(1), model.embed(tiny.tokens()), []
    expected = model.run_block(block, 1, hidden)
    states = attention_states(block)
    states.observe = lambda *given: seen.append([state.shape[:3] for state in given])
    assert torch.equal(model.run_block(block, 1, hidden), expected)
    batch, length = tiny.tokens().shape
    assert seen == [[(batch, 4, length), (batch, 2, length), (batch, 2, length)]]
    states.key = AttentionScheme().rounding({"k_scale": torch.tensor([0.01])}, "k")
    assert not torch.equal(model.run_block(block, 1, hidden), expected)
