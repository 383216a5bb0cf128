"""Families of the fast path: what each of them does otherwise than Llama, against transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets.base import FINAL
from hasten.accel.decoding.targets.families import FAMILIES, build_decoder, refusal
from hasten.accel.decoding.targets.families.llama import Llama
from hasten.accel.decoding.targets.families.weights import ModelWeights, side_by_side
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.tree import ROOT
from tests.models.tiny import WINDOW, build

# Sums run in another order than transformers': a few roundings of logits of size 10.
TOLERANCE = 2e-4
PROMPTS = [[5, 17, 3, 60, 22, 9, 41, 8, 77, 30, 2, 54], [7, 8, 9]]
TREE = [11, 12, 13, 14, 15, 16], [ROOT, 0, 0, 1, 2, 4]
ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


class SeparateWeights(ModelWeights):
    """Weights that are not fused."""

    def product(self, parts):
        return side_by_side([super(SeparateWeights, self).product([part]) for part in parts])


def logits_of(target):
    """Logits of trees behind two prompts of different lengths."""
    target.reserve(2, 24)
    for slot, prompt in enumerate(PROMPTS):
        target.prefill(slot, prompt)
    return target.forward([0, 1], [TREE[0]] * 2, [TREE[1]] * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_hidden_states_and_features_are_those_of_transformers(family):
    model = build(family)
    targets = [FastTarget.of(model), TransformersTarget(model, keeps_hidden=True)]
    outputs = []
    for target in targets:
        engine = Engine(target, policy=Fixed(0), in_flight=2)
        results = engine.decode([Request(str(row), prompt, 12) for row, prompt in enumerate(PROMPTS)])
        outputs.append({result.id: result.token_ids for result in results})
    assert outputs[0] == outputs[1]
    for target in targets:
        target.feature_layers = (0, 1, FINAL)
    found, expected = (logits_of(target) for target in targets)
    torch.testing.assert_close(found.hidden, expected.hidden, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(found.features, expected.features, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text", "qwen3_moe"])
def test_weights_that_cannot_be_fused_give_the_same_logits(family):
    model = build(family)
    separate = FastTarget(build_decoder(model.config, SeparateWeights(model)))
    torch.testing.assert_close(logits_of(separate).logits, logits_of(FastTarget.of(model)).logits)


def test_a_head_may_be_rotated_in_part():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = build("phi3", rope_parameters=rope)
    found, expected = (logits_of(target).logits for target in (FastTarget.of(model), TransformersTarget(model)))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    whole = build("phi3")
    assert not torch.allclose(found, logits_of(FastTarget.of(whole)).logits, atol=0.1), "the factor has an effect"


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotations_are_those_of_transformers(rope):
    config = build("llama", rope_parameters={"rope_theta": 10000.0, **rope}).config
    (rotation,) = Llama(config, None).rotations
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(50)[None])
    table = rotation.table(50, 16, torch.device("cpu"))
    torch.testing.assert_close(table, torch.stack([cos[0, :, :8], sin[0, :, :8]], -1))


@pytest.mark.parametrize(("width", "in_flight"), [(1, 1), (3, 1), (3, 2)])
def test_positions_before_the_windows_are_not_read(width, in_flight):
    model = build("mistral")
    target = FastTarget.of(model)
    target.reserve(2, 40)
    for slot in range(in_flight):
        target.prefill(slot, PROMPTS[0])
    for cache in target._cache:
        cache[:, :, : len(PROMPTS[0]) + 1 - WINDOW] = torch.nan
    new = [20, 21, 22][:width]
    logits = target.forward(range(in_flight), [new] * in_flight, [range(ROOT, width - 1)] * in_flight).logits
    assert not logits.isnan().any()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0] + new])).logits[0, -width:]
    for row in logits:
        torch.testing.assert_close(row, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_chosen_and_weighed_as_transformers_does_to_the_bit(family, dtype):
    model = build(family).to(dtype)
    block = model.model.layers[1].mlp
    mixture = build_decoder(model.config, ModelWeights(model)).layers[1].mlp
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        _, weights, chosen = block.gate(x)
        found = mixture.route(x)
        assert torch.equal(found[0], weights)
        assert torch.equal(found[1], chosen)
        # Of one row, most experts have none. In bfloat16, sums of outputs of some units are rounded otherwise.
        tolerance = TOLERANCE if dtype == torch.float32 else 0.1
        for rows in (x, x[:1]):
            torch.testing.assert_close(mixture(rows), block(rows[None])[0], atol=tolerance, rtol=tolerance)


def test_what_a_family_cannot_do_is_named():
    phi3 = build("phi3").config
    phi3.rope_parameters = {**phi3.rope_parameters, "rope_type": "longrope"}
    assert "(longrope) depends on the length" in refusal(phi3)
    gemma3 = build("gemma3_text").config
    gemma3.use_bidirectional_attention = True
    assert refusal(gemma3) == "its attention is bidirectional"
    llama = build("llama").config
    llama.hidden_act = "relu"
    assert "activation function relu is none of silu" in refusal(llama)


def test_bfloat16_norms_of_gemma_keep_the_digits_of_their_weights():
    model = build("gemma3_text").to(torch.bfloat16)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = build_decoder(model.config, ModelWeights(model)).layers[0].attention_norm
    with torch.no_grad():
        assert torch.equal(norm(x), model.model.layers[0].input_layernorm(x))
