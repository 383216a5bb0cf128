"""Rotations that are folded into the tensors of a checkpoint."""

import json

import pytest
import torch

from hasten.accel.compression.levels.level import parse_level
from hasten.accel.compression.quantizers.round_to_nearest import RoundToNearest
from hasten.accel.compression.transforms.autoround import AutoRound
from hasten.accel.compression.transforms.hadamard import random_hadamard
from hasten.accel.compression.transforms.quarot import QuaRot, hadamard_rotation
from hasten.accel.compression.transforms.rotation import (
    RotatedCheckpoint,
    Rotation,
    check_rotation,
    neutral_weight,
)
from hasten.accel.errors import UserError
from hasten.accel.models import embedded
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from tests.compression import local
from tests.models import tiny

ROTATED = ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"]
TOKENS = tiny.tokens()


def logits(architecture, tokens=TOKENS):
    hidden = architecture.embed(tokens)
    for block in range(architecture.num_blocks):
        hidden = architecture.run_block(architecture.load_block(block), block, hidden)
    return architecture.head(hidden)


def rotated(architecture, **changes):
    rotation = hadamard_rotation(architecture, 0, **changes)
    return Architecture(RotatedCheckpoint(architecture, lambda: rotation, rotation.residual is not None))


@pytest.mark.parametrize("size", [1, 2, 12, 64, 576, 960, 1536, 11008 // 64])
def test_hadamard_matrices_are_orthogonal_and_have_entries_of_one_magnitude(size):
    matrix = random_hadamard(size, torch.Generator().manual_seed(0), "hidden_size")
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_a_size_without_a_hadamard_matrix_is_named():
    with pytest.raises(UserError, match="hidden_size of 66 has no Hadamard matrix"):
        random_hadamard(66, torch.Generator(), "hidden_size")


@pytest.mark.parametrize("family", ROTATED)
def test_a_rotated_model_has_the_logits_of_the_original(family, tmp_path):
    changes = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    original = Architecture(Checkpoint(tiny.save(tmp_path, family, **changes)))
    # Sums of rotated and unrotated products round differently in float32.
    torch.testing.assert_close(logits(rotated(original)), logits(original), rtol=0, atol=1e-4)


def test_the_trained_target_has_the_same_logits_when_it_is_rotated(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(embedded.path("target") / "model.safetensors")
    # In bfloat16, rounding the rotated weights changes logits by more than this test allows.
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((embedded.path("target") / "config.json").read_text())
    original = Architecture(Checkpoint(tmp_path))
    tokens = torch.randint(4096, (1, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(rotated(original), tokens), logits(original, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "opt", "llama"])
def test_values_of_heads_are_rotated_where_the_residual_stream_is_not(family, tmp_path):
    original = Architecture(Checkpoint(tiny.save(tmp_path, family)))
    model = rotated(original, residual=False)
    # OPT's output projection has another name, so that nothing is rotated.
    values = "model.layers.0.self_attn.v_proj.weight"
    if family != "opt":
        assert not torch.equal(model.checkpoint.tensor(values), original.checkpoint.tensor(values))
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("opt", "opt models cannot be rotated: their norms are LayerNorms"),
        ("gemma2", "gemma2 models cannot be rotated: post_feedforward_layernorm scales the channels"),
    ],
)
def test_models_that_do_not_commute_with_a_rotation_are_refused_with_the_reason(family, reason, tmp_path):
    source = tiny.save(tmp_path / "original", family)
    with pytest.raises(UserError, match=reason):
        local.compress(local.settings(source, tmp_path / "out", RoundToNearest(), transforms=(QuaRot(),)), TOKENS)


def test_a_block_that_does_not_compute_the_same_is_refused(tmp_path):
    original = Architecture(Checkpoint(tiny.save(tmp_path, "llama")))
    model, matrix = rotated(original), hadamard_rotation(original, 0).residual
    check_rotation(original, model, matrix, [0, 1])
    other = hadamard_rotation(original, 1).residual
    with pytest.raises(UserError, match="llama models cannot be rotated: the output of block 0 changes by"):
        check_rotation(original, model, other, [0])


def test_gemmas_norms_scale_nothing_at_zero_and_others_at_one():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert neutral_weight(GemmaRMSNorm(8)) == 0.0
    assert neutral_weight(LlamaRMSNorm(8)) == 1.0


def kurtosis(values):
    return float((values.pow(4).mean(1) / values.pow(2).mean(1).square()).mean())


def test_rotation_spreads_a_channel_of_outliers(tmp_path):
    source = tiny.build("llama", tie_word_embeddings=False)
    with torch.no_grad():
        source.model.embed_tokens.weight[:, 5] *= 30
        source.model.layers[0].input_layernorm.weight[7] = 30.0
    source.save_pretrained(tmp_path)
    original = Architecture(Checkpoint(tmp_path))
    model = rotated(original)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        turned = kurtosis(model.checkpoint.tensor(name))
        factors = original.checkpoint.tensor("model.layers.0.input_layernorm.weight") if "q_proj" in name else 1.0
        # One large value of 64 has a kurtosis of nearly 64, normal numbers have one of 3.
        assert kurtosis(original.checkpoint.tensor(name) * factors) > 20
        assert turned < 5


def test_transformers_loads_a_rotated_checkpoint_of_a_tied_model_with_its_own_output_matrix(tmp_path):
    import transformers

    source = tiny.save(tmp_path / "original", "qwen2", tie_word_embeddings=True)
    chosen = local.settings(
        source, tmp_path / "out", RoundToNearest(), level=parse_level("w8g32"), transforms=(QuaRot(),)
    )
    local.compress(chosen, TOKENS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        found = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, logits(Architecture(Checkpoint(tmp_path / "out"))), rtol=1e-3, atol=1e-4)
    expected = logits(Architecture(Checkpoint(source)))
    assert float((found - expected).square().mean()) < 1e-3 * float(expected.square().mean())


def test_a_rotation_must_come_first(tmp_path):
    source = tiny.save(tmp_path / "original", "llama")
    with pytest.raises(UserError, match=r"transforms=\[autoround,quarot\]: quarot rotates the whole model, so it must"):
        local.compress(local.settings(source, tmp_path / "out", transforms=(AutoRound(), QuaRot())), TOKENS)


def test_leaving_nothing_to_rotate_is_refused():
    with pytest.raises(UserError, match="leave nothing to rotate"):
        QuaRot(residual=False, heads=False)


def test_a_model_keeps_its_values_with_the_identity(tmp_path):
    original = Architecture(Checkpoint(tiny.save(tmp_path, "llama")))
    plain = Rotation(torch.eye(original.hidden_size, dtype=torch.float64))
    folded = Architecture(RotatedCheckpoint(original, lambda: plain))
    torch.testing.assert_close(logits(folded), logits(original), rtol=0, atol=1e-5)
    embedding = original.embedding_name()
    assert torch.equal(folded.checkpoint.tensor(embedding), original.checkpoint.tensor(embedding))
