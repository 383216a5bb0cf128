"""What holds for every architecture that is found by inspection: tiny checkpoints are compressed, and load."""

import json
import re

import pytest
import torch
from torch import nn

from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.trial import logits_by_blocks, logits_of, random_model, try_type
from tests.models import architectures

DENSE = [
    "apertus",
    "arcee",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "jais2",
    "minicpm3",
    "ministral3",
    "mpt",
    "nanochat",
    "nemotron",
    "olmo2",
    "olmo3",
    "persimmon",
    "phi",
    "phi3",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
]
MULTIMODAL = ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl"]
REFUSED = {
    "gpt2": "Conv1D",
    "falcon": "FalconLinear",
    "roberta": "between the last block and the output layer",
    "zamba2": "depends on the tokens",
    "rwkv": "changes the hidden states between the blocks",
}


@pytest.mark.parametrize("model_type", [*DENSE, *MULTIMODAL])
def test_an_architecture_is_compressed_as_a_whole_and_loads(tmp_path, model_type):
    model = random_model(model_type)
    expected = logits_of(model)
    source, output = tmp_path / "source", tmp_path / "output"
    model.save_pretrained(source)
    original = Architecture(Checkpoint(source))
    torch.testing.assert_close(logits_by_blocks(original), expected, atol=1e-4, rtol=1e-4)

    facts = architectures.compress(source, output)
    blocks = range(original.num_blocks)
    linear = {
        f"{original.block_start(index)}{path}"
        for index in blocks
        for path, module in original._skeleton.blocks[index].named_modules()
        if isinstance(module, nn.Linear)
    }
    quantized = {row["layer"] for row in facts}
    skipped = {name for index in blocks for name in original.skipped(index)}
    assert quantized | skipped == linear
    assert quantized
    ignored = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
    patterns = [re.compile(item.removeprefix("re:") if item.startswith("re:") else re.escape(item)) for item in ignored]
    assert all(any(pattern.fullmatch(name) for pattern in patterns) for name in skipped)
    assert not any(pattern.fullmatch(name) for name in quantized for pattern in patterns)

    compressed = logits_by_blocks(Architecture(Checkpoint(output)))
    assert (compressed - expected).abs().max() > 0.01
    torch.testing.assert_close(logits_of(architectures.load(output)), compressed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_what_is_no_language_model_is_copied_unchanged(tmp_path, model_type):
    source, output = tmp_path / "source", tmp_path / "output"
    random_model(model_type).bfloat16().save_pretrained(source)
    architectures.compress(source, output)
    before, after = Checkpoint(source), Checkpoint(output)
    outer = Architecture(before).outer_tensors()
    assert any("vis" in name for name in outer)
    for name in outer:
        assert torch.equal(before.tensor(name), after.tensor(name))


@pytest.mark.parametrize(("model_type", "words"), REFUSED.items())
def test_what_is_refused_has_a_reason(model_type, words):
    assert words in try_type(model_type).reason


def test_layers_of_one_input_form_a_group_and_its_norm_is_named(tmp_path):
    random_model("cohere").save_pretrained(tmp_path)
    layout = Architecture(Checkpoint(tmp_path)).layout(0)
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    # Attention and feed-forward network of a parallel block read the same norm.
    groups = [(set(group.paths), group.norm) for group in layout.groups]
    assert (set(attention) | {"mlp.gate_proj", "mlp.up_proj"}, "input_layernorm") in groups
    assert ({"mlp.down_proj"}, None) in groups
    assert len(groups) == 3


@pytest.mark.parametrize(
    ("model_type", "changes", "field", "value"),
    [
        ("cohere", {"logit_scale": 0.3}, "logit_scale", 0.3),
        ("granite", {"logits_scaling": 7.0}, "logit_scale", 1 / 7),
        ("gemma2", {"final_logit_softcapping": 12.5}, "cap", 12.5),
    ],
)
def test_scales_and_caps_of_logits_are_found(tmp_path, model_type, changes, field, value):
    model = random_model(model_type, **changes)
    model.save_pretrained(tmp_path)
    architecture = Architecture(Checkpoint(tmp_path))
    assert getattr(architecture.adapter, field) == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(logits_by_blocks(architecture), logits_of(model), atol=1e-5, rtol=1e-5)


def test_a_model_below_any_prefix_runs_alike(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_model("qwen3")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {f"wrapper.inner.{name}": tensor.half() for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    torch.testing.assert_close(
        logits_by_blocks(Architecture(Checkpoint(tmp_path))), logits_of(model), atol=1e-4, rtol=1e-4
    )
