"""Mixtures of experts, linear attention and state-space models: compressed as a whole, and loaded by transformers."""

import importlib

import pytest
import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from hasten.accel.compression.calibration.layer_groups import make_layer_groups
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.levels.level import parse_level
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.experts import Experts, Layout, is_fused
from hasten.accel.models.loading_needs import fuses_experts
from hasten.accel.models.trial import logits_by_blocks, logits_of, random_model, try_type
from tests.models import architectures, tiny

METHOD = "compressed-tensors"
# One for each kind: fused, shared and transposed experts, latent and linear attention, states, and mixes of them.
ALONE = ["mixtral", "qwen3_next", "deepseek_v3", "llama4_text", "mamba2", "nemotron_h"]
OTHERS = [
    "qwen2_moe",
    "qwen3_5_moe_text",
    "deepseek_v2",
    "glm4_moe",
    "glm_moe_dsa",
    "falcon_h1",
    "jamba",
    "olmoe",
    "phimoe",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "laguna",
]
WITH_LOADER, OTHERS_WITH_LOADER = ["gpt_oss", "granitemoe"], ["granitemoehybrid", "aria_text"]
SLOW = [pytest.param(model_type, marks=pytest.mark.slow) for model_type in (*OTHERS, *OTHERS_WITH_LOADER)]
REFUSED = {"zaya": "the block before them", "deepseek_v4": "have the shape", "jetmoe": "does not run without values"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """transformers as it is without hasten."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, CompressedTensorsHfQuantizer)


@pytest.mark.parametrize("model_type", [*ALONE, *WITH_LOADER, *SLOW])
def test_every_linear_is_compressed_or_left_out_with_a_reason_and_the_result_loads(tmp_path, model_type, monkeypatch):
    model = random_model(model_type)
    expected = logits_of(model)
    source, output = tmp_path / "source", tmp_path / "output"
    model.save_pretrained(source)
    original = Architecture(Checkpoint(source))
    # Experts are added in another order.
    torch.testing.assert_close(logits_by_blocks(original), expected, atol=1e-4, rtol=1e-4)
    facts = architectures.compress(source, output)
    quantized = {row["layer"] for row in facts}
    assert len(quantized) == sum(map(_linear_layers, original._skeleton.blocks))
    skipped = {name for index in range(original.num_blocks) for name in original.skipped(index)}
    assert not quantized & skipped
    assert all(f"{name}.weight" in original.checkpoint for name in quantized)
    compressed = logits_by_blocks(Architecture(Checkpoint(output)))
    assert (compressed - expected).abs().max() > 0.01
    needs_loader = model_type in (*WITH_LOADER, *OTHERS_WITH_LOADER)
    assert fuses_experts(original.checkpoint.config) == needs_loader
    if needs_loader:
        loader = importlib.import_module("hasten.accel.models.transformers_loader").Loader
        monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, loader)
    torch.testing.assert_close(logits_of(architectures.load(output)), compressed, atol=1e-4, rtol=1e-4)


def _linear_layers(block):
    """Number of linear layers of a block that are to be compressed, experts counted one by one."""
    plain = (
        "gate",
        "router",
        "wg",
        "shared_expert_gate",
        "in_proj_ba",
        "in_proj_a",
        "in_proj_b",
        "dt_proj",
        "weights_proj",
    )
    modules = dict(block.named_modules())
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    experts = sum(len(list(Layout.of(module).layers())) for module in modules.values() if is_fused(module))
    return experts + sum(path.rpartition(".")[2] not in plain for path in linear)


@pytest.mark.parametrize("model_type", [*ALONE, *WITH_LOADER, *SLOW])
def test_layers_are_listed_in_the_order_in_which_a_block_runs_them(tmp_path, model_type):
    random_model(model_type).save_pretrained(tmp_path)
    model = Architecture(Checkpoint(tmp_path))
    groups = make_layer_groups(model, parse_level("w8"), (), 0, 0)
    shard = Shard(model, {0: tiny.tokens(2)}, batch=1)
    with torch.no_grad():
        for index in range(model.num_blocks):
            if not groups[index]:
                shard.advance(model.load_block(index))
                continue
            staged = shard.begin(model.stream_block(index), groups[index])
            for number, stage in enumerate(staged.stages):
                found = staged.collect(number, [group.key for group in stage])
                # A stage that the block had passed would have nothing to collect.
                assert stage[0].is_expert or list(found) == [stage[0].key]
                staged.replace(())
            shard.finish()


@pytest.mark.parametrize(("model_type", "words"), REFUSED.items())
def test_what_is_refused_has_a_reason(model_type, words):
    assert words in try_type(model_type).reason


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
def test_all_experts_see_all_tokens_and_the_output_stays(tmp_path, model_type):
    random_model(model_type).save_pretrained(tmp_path)
    model = Architecture(Checkpoint(tmp_path))
    model.all_experts = True
    index = next(index for index in range(model.num_blocks) if model.layout(index).experts)
    block = model.load_block(index)
    experts = next(module for module in block.modules() if isinstance(module, Experts))
    seen, given = {}, []
    for number in range(experts.layout.number):
        layer = experts.get_submodule(f"{number}.up_proj")
        layer.register_forward_pre_hook(lambda _, inputs, number=number: seen.setdefault(number, []).append(inputs[0]))
    experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    hidden = torch.randn(2, 12, model.hidden_size)
    model.run_block(block, index, hidden)
    routed = {number: len(parts[0]) for number, parts in seen.items()}
    assert sum(routed.values()) < 24 * experts.layout.number
    seen.clear()
    experts.show(range(experts.layout.number), *given[0])
    assert {number: len(parts[0]) for number, parts in seen.items()} == dict.fromkeys(range(experts.layout.number), 24)
    experts.all_tokens = False
    seen.clear()
    experts.show(range(experts.layout.number), *given[0])
    assert {number: len(parts[0]) for number, parts in seen.items()} == routed
