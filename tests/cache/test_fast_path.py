"""Every method on the fast path: the tokens of the transformers path, and which checkpoints take which path."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from hasten import conf
from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.evict.streaming_llm import StreamingLLM
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompt.base import PromptMethod
from hasten.accel.cache.prompt.speckv import SpecKV
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets.cached import CachedFastTarget, CachedTarget
from hasten.accel.decoding.targets.families import build_decoder
from hasten.accel.decoding.targets.families.weights import ModelWeights
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.loading import load_target, shape_of
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError
from tests.models import tiny

CONFIGS = sorted((Path(conf.__file__).parent / "cache").glob("*.yaml"))
NEW = 36
PROMPTS = torch.randint(3, tiny.VOCABULARY, (3, 90), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def method(request: pytest.FixtureRequest) -> CacheMethod:
    made: CacheMethod = instantiate(OmegaConf.load(request.param))
    return made


def budget(method: CacheMethod) -> CacheBudget | None:
    return CacheBudget(40) if method.has_budget else None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = tiny.save(tmp_path_factory.mktemp("model") / "m", "llama", max_position_embeddings=1024)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def fast(model, method: CacheMethod, kept: CacheBudget | None) -> CachedFastTarget:
    decoder = build_decoder(model.config, ModelWeights(model))
    return CachedFastTarget(decoder, shape_of(model.config, decoder.dtype, decoder.device), method, kept)


def decoded(target, drafts: int, in_flight: int) -> dict[str, list[int]]:
    requests = [Request(str(row), tokens[: 60 + 7 * row].tolist(), NEW) for row, tokens in enumerate(PROMPTS)]
    drafter = PromptLookup(min_ngram=1) if drafts else None
    engine = Engine(target, drafter, policy=Fixed(drafts), in_flight=in_flight, prefill_chunk=32)
    return {result.id: result.token_ids for result in engine.decode(requests)}


def test_it_decodes_the_tokens_of_the_transformers_path(model, method):
    if isinstance(method, PromptMethod):
        pytest.skip("runs prompts itself, on the transformers path")
    expected = decoded(CachedTarget(model, method, budget(method)), 0, 1)
    target = fast(model, method, budget(method))
    assert decoded(target, 0, 3) == expected
    assert decoded(target, 6, 2) == expected


def step_logits(target, tokens) -> torch.Tensor:
    target.reserve(1, 200)
    target.prefill(0, tokens[:60])
    target.end_prompt(0)
    rows = []
    for token in tokens[60:]:
        rows.append(target.forward([0], [[token]], [[ROOT]]).logits[0, 0])
        target.commit(0, [0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("family", "method", "value"),
    [("qwen3", KIVI(bits=8), None), ("gemma2", KIVI(bits=8), None), ("phi3", StreamingLLM(), CacheBudget(30))],
)
def test_families_differ_from_the_transformers_path_by_rounding_only(tmp_path, family, method, value):
    # Windows, soft caps, norms of heads, heads that are rotated in part.
    folder = tiny.save(tmp_path / "m", family, max_position_embeddings=1024)
    tokens = PROMPTS[0].tolist()
    paths = {
        path: step_logits(load_target(folder, torch.float32, path=path, cache=method, cache_budget=value), tokens)
        for path in ("fast", "transformers")
    }
    torch.testing.assert_close(paths["fast"], paths["transformers"], rtol=1e-3, atol=1e-3)


def test_stored_keys_are_those_of_transformers(model):
    target = fast(model, Full(), None)
    step_logits(target, PROMPTS[0].tolist())
    attach(model)
    cache = CompressedCache(model, Full())
    with torch.no_grad():
        model(PROMPTS[:1], past_key_values=cache)
    for own, other in zip(target._compressed.compressed, cache.compressed, strict=True):
        one, two = own.sequences[0].uncompressed(), other.sequences[0].uncompressed()
        torch.testing.assert_close(one.keys, two.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.values, two.values, rtol=1e-4, atol=1e-4)


def test_families_of_the_fast_path_take_it_and_others_do_not(tmp_path):
    for family, expected in (("llama", CachedFastTarget), ("opt", CachedTarget)):
        folder = tiny.save(tmp_path / family, family, max_position_embeddings=1024)
        assert type(load_target(folder, torch.float32, cache=KIVI())) is expected
    assert type(load_target(tmp_path / "llama", torch.float32, path="transformers", cache=KIVI())) is CachedTarget
    prompts = {"cache": SpecKV(), "cache_budget": CacheBudget(0.5)}
    assert type(load_target(tmp_path / "llama", torch.float32, **prompts)) is CachedTarget
    with pytest.raises(UserError, match="cache=SpecKV runs prompts itself"):
        load_target(tmp_path / "llama", torch.float32, path="fast", **prompts)
    assert type(load_target(tmp_path / "llama", torch.float32, cache=Full())) is FastTarget


def test_the_first_layers_are_a_target_with_a_dense_cache(model):
    part = fast(model, KIVI(), None).first_layers(1)
    expected = FastTarget.of(model).first_layers(1)
    tokens = PROMPTS[0].tolist()
    assert torch.equal(step_logits(part, tokens), step_logits(expected, tokens))
