import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hasten.accel.decoding.targets.families import FAMILIES
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.models import tiny

LENGTHS = (24, tiny.WINDOW - 1)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def reference(path: Path, tokens: Tensor) -> Tensor:
    """Logits of the model as transformers loads and runs it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def run(architecture: Architecture, tokens: Tensor) -> Tensor:
    """Logits computed block by block."""
    hidden = architecture.embed(tokens)
    for index in range(architecture.num_blocks):
        hidden = architecture.run_block(architecture.load_block(index), index, hidden)
    return architecture.head(hidden)


def same_logits(path: Path) -> Architecture:
    """Compare logits with those of transformers at two lengths, batch size 2; returns the architecture."""
    architecture = Architecture(Checkpoint(path))
    for length in LENGTHS:
        tokens = tiny.tokens(length=length)
        logits = run(architecture, tokens)
        expected = reference(path, tokens)
        assert expected.std() > 0.05
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    return architecture


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        Architecture(Checkpoint(path))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.fixture
def copy(checkpoints, tmp_path) -> Path:
    """A private copy of an unsharded Llama, embeddings untied."""
    return Path(shutil.copytree(checkpoints("llama"), tmp_path / "copy"))


def rewrite(path: Path, **tensors: Tensor | None) -> None:
    """Change (None: remove) some tensors of an unsharded checkpoint; `__` in a name stands for a dot."""
    content = load_file(path / "model.safetensors")
    for key, tensor in tensors.items():
        content.pop(key.replace("__", "."), None)
        if tensor is not None:
            content[key.replace("__", ".")] = tensor
    save_file(content, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("sharded", "tied"), [(False, True), (True, False)], ids=["single-tied", "sharded-untied"])
def test_logits_are_transformers_own(checkpoints, family, sharded, tied):
    path = checkpoints(family, sharded, tied)
    assert (len(list(path.glob("*.safetensors"))) > 5) == sharded
    architecture = same_logits(path)
    assert (architecture.num_blocks, architecture.hidden_size) == (2, 64)
    names = [architecture.block_tensors(0), architecture.block_tensors(1), architecture.outer_tensors()]
    assert sorted(name for part in names for name in part) == Checkpoint(path).names
    assert ("lm_head.weight" in names[2]) != tied
    assert architecture.block_tensors(2) == []


def test_every_family_of_the_fast_path_is_tested():
    assert set(tiny.FAMILIES) == {*FAMILIES, "opt"}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("opt", {"word_embed_proj_dim": 32}),
        ("opt", {"do_layer_norm_before": False}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": tiny.WINDOW, "max_window_layers": 1}),
        ("mixtral", {"sliding_window": tiny.WINDOW}),
        ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 1, "norm_topk_prob": False}),
    ],
)
def test_variants_of_a_family_run_alike(tmp_path, family, changes):
    same_logits(tiny.save(tmp_path / "model", family, **changes))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_run_alike(tmp_path, family):
    tiny.build(family).save_pretrained(tmp_path, save_original_format=False)
    same_logits(tmp_path)


def test_a_checkpoint_without_the_model_prefix_runs_alike(tmp_path):
    model = tiny.build("llama", tie_word_embeddings=True).model
    model.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in Checkpoint(tmp_path).names
    same_logits(tmp_path)


def test_tied_weights_may_be_stored_under_either_or_both_names(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    same_logits(copy)
    rewrite(copy, model__embed_tokens__weight=None)
    same_logits(copy)


def test_the_language_model_of_a_multimodal_gemma_runs_alike(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=tiny.build("gemma3_text").config.to_dict(),
        vision_config={**vision, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=tiny.VOCABULARY - 1,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    architecture = same_logits(tmp_path)
    assert any("vision_tower" in name for name in architecture.outer_tensors())
    assert not any("vision_tower" in name for name in architecture.block_tensors(0))


def test_a_compressed_checkpoint_runs_as_transformers_runs_it(packed, checkpoints):
    compressed = run(same_logits(packed), tiny.tokens())
    original = run(Architecture(Checkpoint(checkpoints("llama"))), tiny.tokens())
    assert not torch.allclose(compressed, original, atol=0.01)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_linears_are_the_blocks_own_in_the_order_they_run(checkpoints, family):
    architecture = Architecture(Checkpoint(checkpoints(family)))
    hidden = architecture.embed(tiny.tokens())
    for index in range(architecture.num_blocks):
        block = architecture.load_block(index)
        layers = architecture.linears(index)
        modules = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert {layer.module for layer in layers} == set(modules)
        inputs: dict[str, Tensor] = {}

        def keep(path: str, into: dict[str, Tensor] = inputs) -> Any:
            return lambda module, arguments: into.__setitem__(path, arguments[0])

        for path, module in modules.items():
            module.register_forward_pre_hook(keep(path))
        hidden = architecture.run_block(block, index, hidden)
        assert list(inputs) == [layer.module for layer in layers if layer.module in inputs]
        assert [layer for layer in layers if layer.expert is None and layer.module not in inputs] == []
        groups: dict[str, Tensor] = {}
        for layer in layers:
            weight = modules[layer.module].weight
            assert tuple(weight.shape) == (layer.rows, layer.columns)
            assert torch.equal(weight, architecture.checkpoint.tensor(f"{layer.name}.weight"))
            assert f"{layer.name}.weight" in architecture.block_tensors(index)
            if layer.module in inputs:
                assert torch.equal(groups.setdefault(layer.group, inputs[layer.module]), inputs[layer.module])
        # And inputs that differ never share a group.
        assert len({id(tensor) for tensor in groups.values()}) == len(
            {layer.group for layer in layers if layer.module in inputs}
        )


@pytest.mark.parametrize(("family", "index"), [("mixtral", 0), ("qwen3_moe", 1)])
def test_an_expert_sees_its_own_tokens_only(checkpoints, family, index):
    architecture = Architecture(Checkpoint(checkpoints(family)))
    tokens = tiny.tokens()
    block = architecture.load_block(index)
    seen: dict[int, int] = {}
    for layer in architecture.linears(index):
        if layer.module.endswith("down_proj"):
            assert layer.expert is not None
            block.get_submodule(layer.module).register_forward_pre_hook(
                lambda module, arguments, expert=layer.expert: seen.update({expert: len(arguments[0])})
            )
    architecture.run_block(block, index, architecture.embed(tokens))
    # Two experts for every token.
    assert sum(seen.values()) == 2 * tokens.numel()
    assert max(seen.values()) < tokens.numel()


def test_only_the_tensors_in_use_are_read(checkpoints, monkeypatch):
    checkpoint = Checkpoint(checkpoints("llama"))
    read: list[str] = []
    tensor = checkpoint.tensor
    monkeypatch.setattr(checkpoint, "tensor", lambda name, dtype=None: read.append(name) or tensor(name, dtype))
    architecture = Architecture(checkpoint)
    hidden = architecture.embed(tiny.tokens())
    architecture.block_arguments(24)
    architecture.linears(0)
    assert read == []
    block = architecture.load_block(1)
    assert sorted(read) == architecture.block_tensors(1)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in block.parameters())
    assert not block.training
    read.clear()
    architecture.head(hidden)
    architecture.head(hidden)
    assert sorted(read) == ["lm_head.weight", "model.norm.weight"]
    architecture.close()
    architecture.head(hidden)
    assert len(read) == 4


def test_blocks_are_made_anew_and_the_skeleton_stays_empty(checkpoints):
    architecture = Architecture(Checkpoint(checkpoints("mixtral")))
    first, second = architecture.load_block(0), architecture.load_block(0)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in second.parameters())
    assert all(parameter.is_meta for block in architecture._skeleton.blocks for parameter in block.parameters())


def test_the_model_runs_in_other_dtypes(checkpoints):
    path = checkpoints("llama")
    exact = run(Architecture(Checkpoint(path)), tiny.tokens())
    architecture = Architecture(Checkpoint(path), dtype=torch.bfloat16)
    assert architecture.embed(tiny.tokens()).dtype == torch.bfloat16
    assert architecture.load_block(0).mlp.up_proj.weight.dtype == torch.bfloat16
    rounded = run(architecture, tiny.tokens())
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("token", [-1, tiny.VOCABULARY])
def test_tokens_outside_the_vocabulary_are_named(checkpoints, token):
    architecture = Architecture(Checkpoint(checkpoints("opt")))
    with pytest.raises(UserError, match=f"token {token} .* {tiny.VOCABULARY}"):
        architecture.embed(torch.tensor([[5, token]]))


def test_sequences_beyond_learned_positions_are_refused(checkpoints):
    architecture = Architecture(Checkpoint(checkpoints("opt")))
    assert len(architecture.block_arguments(64)) == 2
    for call in (architecture.block_arguments, lambda length: architecture.embed(torch.full((1, length), 3))):
        with pytest.raises(UserError, match=r"length 65 .* 64 positions"):
            call(65)


def test_types_that_transformers_lacks_are_named(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    refused(copy, "no_such_type")


def test_a_config_that_transformers_refuses_is_named(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "no-such-function"}))
    refused(copy, "config.json", "no-such-function")


def test_tensors_of_the_wrong_shape_are_named(copy):
    rewrite(copy, model__layers__1__mlp__up_proj__weight=torch.zeros(127, 64))
    refused(copy, "model.layers.1.mlp.up_proj.weight", "[127, 64]", "[128, 64]")


def test_experts_of_the_wrong_shape_are_named(checkpoints, tmp_path):
    path = Path(shutil.copytree(checkpoints("mixtral"), tmp_path / "copy"))
    rewrite(path, model__layers__1__block_sparse_moe__experts__2__w2__weight=torch.zeros(64, 31))
    refused(path, "experts.2.w2", "[64, 31]", "[64, 32]")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_missing_tensors_are_named(copy, name):
    rewrite(copy, **{name.replace(".", "__"): None})
    refused(copy, name, "missing")


def test_checkpoints_without_blocks_are_refused(copy):
    content = load_file(copy / "model.safetensors")
    renamed = {name.replace("layers.", "parts."): tensor for name, tensor in content.items() if "proj" not in name}
    save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    refused(copy, "model.layers.0.", "missing")


def test_weights_that_are_not_finite_are_named_where_they_are_read(copy):
    content = load_file(copy / "model.safetensors")
    for name in (
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ):
        bad = content[name].clone()
        bad.view(-1)[-1] = torch.nan
        rewrite(copy, **{name.replace(".", "__"): bad})
        architecture = Architecture(Checkpoint(copy))
        architecture.load_block(0)
        with pytest.raises(UserError, match=f"tensor {name} .* NaN"):
            run(architecture, torch.tensor([[3, tiny.VOCABULARY - 1]]))
        rewrite(copy, **{name.replace(".", "__"): content[name]})
