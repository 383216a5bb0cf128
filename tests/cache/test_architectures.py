"""Every cache method on tiny random models of 21 architectures: it runs, or refuses with the reason."""

from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompt.base import PromptMethod, takes_contexts
from hasten.accel.cache.prompts import prefill
from hasten.accel.cache.rotary import rotary_of
from hasten.accel.errors import UserError
from hasten.accel.models.trial import random_model
from tests.cache.test_contract import CONFIGS

# Soft caps that change scores of order 1.
ARCHITECTURES = {
    "llama": {},
    "llama4_text": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
    "phi3": {},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3_text": {},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {},
    "granite": {},
    "smollm3": {},
    "glm4": {},
    "cohere2": {},
    "starcoder2": {},
    "stablelm": {},
    "gpt_oss": {},
}
# Why an architecture runs with no method, and why it does not with those that turn keys back.
REFUSED = {"llama4_text": "attend within chunks of"}
UNROTATED = "has no rotary embedding that is the same in all layers"
UNROTATED_IN = {"gemma3_text", "gpt2", "opt"}
# Longer than the sliding windows.
TOKENS = torch.randint(10, 90, (1, 26), generator=torch.Generator().manual_seed(0))
STEPS = [(0, 20), (20, 25), (25, 26)]


@cache
def methods():
    return {path.stem: instantiate(OmegaConf.load(path)) for path in CONFIGS}


def logits(model, held):
    """Logits (26, V) of a prompt, a chunk and a token; or from its last token on."""
    found, steps = [], STEPS
    if isinstance(held, CompressedCache) and isinstance(held.method, PromptMethod):
        found, steps = [prefill(model, held, TOKENS[:, :20], max_new_tokens=6, leave=0)], STEPS[1:]
    with torch.no_grad():
        for start, stop in steps:
            out = model(TOKENS[:, start:stop], past_key_values=held, use_cache=True)
            held = out.past_key_values
            found.append(out.logits[0])
    return torch.cat(found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_method_runs_or_refuses_with_the_reason_and_a_full_budget_is_transformers_own_cache(name):
    model = random_model(name, **ARCHITECTURES[name])
    # The only one that knows soft caps and sinks.
    model.set_attn_implementation("eager")
    expected = logits(model, None)
    attach(model)
    for method_name, method in methods().items():
        if takes_contexts(method):
            continue
        for budget in [CacheBudget(1000), CacheBudget(8)] if method.has_budget else [None]:
            refusal = REFUSED.get(name)
            if refusal is None and method.needs_rotary and name in UNROTATED_IN:
                refusal = UNROTATED
            if refusal is not None:
                with pytest.raises(UserError, match=refusal):
                    CompressedCache(model, method, budget)
                continue
            held = CompressedCache(model, method, budget)
            found = logits(model, held)
            where = f"{method_name} {budget}"
            assert found.isfinite().all(), where
            # Up to the first compression all see the same.
            if not isinstance(method, PromptMethod):
                torch.testing.assert_close(found[:20], expected[:20], rtol=1e-3, atol=1e-3, msg=where)
            if isinstance(method, Full) or (budget is not None and budget.value == 1000):
                torch.testing.assert_close(found, expected[-len(found) :], rtol=1e-3, atol=1e-3, msg=where)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "BloomForCausalLM does not compute its attention by transformers' attention interface"),
        ("falcon", "FalconForCausalLM does not compute its attention by transformers' attention interface"),
        ("deepseek_v3", r"before its attention does, as models do that cache latents \(linear\)"),
        ("qwen3_next", "Qwen3NextForCausalLM has layers of linear_attention: only caches of keys and values"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(name, reason):
    model = random_model(name)

    def run():
        attach(model)
        logits(model, CompressedCache(model, Full()))

    with pytest.raises(UserError, match=reason):
        run()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("gpt_neox", {}),
        ("glm4", {}),
        # YaRN scales keys, and gpt-oss stores half of the cosines.
        ("gpt_oss", {}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}),
    ],
)
def test_keys_are_turned_back_and_forth_without_a_change(name, changes):
    rotate = rotary_of(random_model(name, **changes))
    keys = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(3, 8).expand(2, -1)
    turned = rotate(0, keys, positions, False)
    assert not torch.allclose(turned, keys, atol=1e-2)
    scale = turned.norm(dim=-1) / keys.norm(dim=-1)
    torch.testing.assert_close(scale, scale[:1, :1].expand_as(scale))
    torch.testing.assert_close(rotate(0, turned, positions, True), keys)
