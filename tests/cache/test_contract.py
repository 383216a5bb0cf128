"""What every method of conf/cache must do, in generate() and under the engine."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten import conf
from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.cache import CompressedCache, Handle
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompt.base import PromptMethod, saved_positions, takes_contexts
from hasten.accel.cache.prompts import prefill
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets.cached import CachedTarget
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from tests.models import tiny

CONFIGS = sorted((Path(conf.__file__).parent / "cache").glob("*.yaml"))
NEW = 40
# Hyper-parameters with which a method does to prompts of 90 tokens what its defaults do to longer ones.
SMALL = {
    "actqkv": {"block": 8},
    "lserve": {"page": 16, "sinks": 4, "local": 32},
    "sentencekv": {"held": 1.5, "sinks": 4, "longest": 8},
    "vidkv": {"residual": 32},
}
# Of methods that read contexts beside a prompt: where they begin, and where the last one ends.
CONTEXTS = (4, 20, 36)
PROMPTS = torch.randint(3, tiny.VOCABULARY, (3, 90), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def method(request: pytest.FixtureRequest) -> CacheMethod:
    made: CacheMethod = instantiate(OmegaConf.load(request.param), **SMALL.get(request.param.stem, {}))
    return made


def budget(method: CacheMethod, value: float) -> CacheBudget | None:
    return CacheBudget(value) if method.has_budget else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "m", "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def model(folder):
    """The model of all methods, which is loaded once: a method keeps nothing in it."""
    loaded = load(folder)
    attach(loaded)
    return loaded


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3_text", "mistral"])
def uncompressed(request, tmp_path_factory):
    """A model of each family, and its logits with transformers' own cache, before anything is attached."""
    folder = tiny.save(tmp_path_factory.mktemp("family") / "m", request.param, max_position_embeddings=1024)
    loaded = load(folder)
    expected, _ = logits(loaded, PROMPTS[:1], None)
    attach(loaded)
    return loaded, expected


@pytest.fixture(scope="module")
def text():
    """The trained target, and 700 tokens of a Python file."""
    folder = resolve("embedded:target")
    content = Path(torch.overrides.__file__).read_text()
    return load(folder), torch.tensor([AutoTokenizer.from_pretrained(folder)(content).input_ids[:700]])


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model, tokens: torch.Tensor, cache: CompressedCache | None, mask: torch.Tensor | None = None):
    """Logits of the prompt's last token and of NEW tokens fed one by one, (B, NEW + 1, V); the cache."""
    split = tokens.shape[1] - NEW
    lower = saved_positions(CONTEXTS) if cache is not None and takes_contexts(cache.method) else 0
    positions = None if mask is None else (mask.cumsum(1) - 1 - lower).clamp(min=0)
    last, cache = prompt(model, tokens[:, :split], cache, None if mask is None else mask[:, :split], positions)
    found = [last]
    for at in range(split, tokens.shape[1]):
        inputs = {"attention_mask": None if mask is None else mask[:, : at + 1]}
        if positions is not None:
            inputs["position_ids"] = positions[:, at : at + 1]
        with torch.no_grad():
            out = model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True, **inputs)
        found.append(out.logits[:, -1])
    return torch.stack(found, 1), cache


def prompt(model, tokens, cache, mask=None, positions=None):
    """Logits behind a prompt, and the cache; through `prefill` for methods that read prompts before they run."""
    if cache is not None and isinstance(cache.method, PromptMethod):
        contexts = CONTEXTS if cache.method.takes_contexts else ()
        return prefill(model, cache, tokens, mask, max_new_tokens=8, contexts=contexts, leave=0), cache
    inputs = {} if positions is None else {"position_ids": positions[:, : tokens.shape[1]]}
    with torch.no_grad():
        out = model(tokens, past_key_values=cache, use_cache=True, attention_mask=mask, **inputs)
    return out.logits[:, -1], out.past_key_values


def test_a_sequence_has_the_same_bits_in_a_batch_as_alone(model, method):
    batch, _ = logits(model, PROMPTS, CompressedCache(model, method, budget(method, 40)))
    for row in range(len(PROMPTS)):
        one, _ = logits(model, PROMPTS[row : row + 1], CompressedCache(model, method, budget(method, 40)))
        torch.testing.assert_close(batch[row], one[0], rtol=0, atol=1e-5)  # products of other parts of the model
        assert batch[row].argmax(-1).equal(one[0].argmax(-1))


def test_attention_of_a_sequence_does_not_depend_on_its_batch_by_a_single_bit(method):
    model = load_attention(method)
    whole, alone = model(2), model(1)
    assert torch.equal(whole[:1], alone)


def load_attention(method: CacheMethod):
    """Outputs of a layer's attention for the first `count` of two sequences, in three passes."""

    def outputs(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        cache = CompressedCache(tiny.build("llama"), method, budget(method, 24))
        layer = next(cache.compressed)
        found = []
        for width in (50, 1, 1):
            keys, values = (torch.randn(2, 2, width, 16, generator=generator)[:count] for _ in range(2))
            queries = torch.randn(2, width, 4, 16, generator=generator)[:count]
            handle, _ = layer.update(keys, values)
            assert isinstance(handle, Handle)
            found.append(layer.attend(handle, queries, None, None, None))
        return torch.cat(found, 1)

    return outputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, method, side):
    lengths = [90, 77, 81]
    tokens, mask = PROMPTS.clone(), torch.ones_like(PROMPTS)
    for row, length in enumerate(lengths):
        if side == "left":
            mask[row, : 90 - length] = 0
        else:
            mask[row, 50 - (90 - length) : 50] = 0  # the end of the prompt
    found, cache = logits(model, tokens, CompressedCache(model, method, budget(method, 40)), mask)
    for row in range(len(lengths)):
        own = tokens[row, mask[row].bool()][None]
        alone, one = logits(model, own, CompressedCache(model, method, budget(method, 40)))
        # A right-padded prompt's last column is no token of the sequence.
        first = 1 if side == "right" else 0
        torch.testing.assert_close(found[row, first:], alone[0, first:], rtol=0, atol=1e-5)
        assert next(cache.compressed).sequences[row].tokens == next(one.compressed).sequences[0].tokens


def test_a_full_budget_is_no_compression(uncompressed, method):
    if not method.has_budget and not isinstance(method, Full):
        pytest.skip("has no budget")
    model, expected = uncompressed
    found, _ = logits(model, PROMPTS[:1], CompressedCache(model, method, budget(method, 1000)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32, in another order


def test_what_is_evicted_is_freed_and_all_that_is_held_is_counted(text, method):
    if not method.frees:
        pytest.skip("holds everything")
    model, tokens = text
    attach(model)
    held = {}
    for name, made in (("full", Full()), ("own", method)):
        cache = CompressedCache(model, made, budget(made, 0.5))
        prompt(model, tokens, cache)
        tensors = [
            tensor
            for layer in cache.compressed
            for sequence in layer.sequences
            for tensor in vars(sequence).values()
            if isinstance(tensor, torch.Tensor)
        ]
        segments = [segment for layer in cache.compressed for one in layer.sequences for segment in one.segments]
        tensors += [tensor for segment in segments for tensor in segment.tensors()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        assert cache.nbytes == sum(storages.values())
        held[name] = cache.nbytes
    # Queries that are remembered, and positions, come on top of the half.
    assert held["own"] < (0.75 if method.has_budget else 0.9) * held["full"]


def test_under_the_engine_drafts_change_no_token(model, method):
    contexts = CONTEXTS if takes_contexts(method) else ()
    requests = [
        Request(str(row), tokens[: 60 + 7 * row].tolist(), NEW, contexts=contexts) for row, tokens in enumerate(PROMPTS)
    ]

    def decoded(drafts: int, in_flight: int) -> dict[str, list[int]]:
        target = CachedTarget(model, method, budget(method, 40))
        drafter = PromptLookup(min_ngram=1) if drafts else None
        engine = Engine(target, drafter, policy=Fixed(drafts), in_flight=in_flight, prefill_chunk=32)
        return {result.id: result.token_ids for result in engine.decode(requests)}

    plain = decoded(0, 1)
    assert decoded(6, 1) == plain
    assert decoded(6, 3) == plain


def test_a_budget_is_given_where_the_method_has_one(model, method):
    if method.has_budget:
        with pytest.raises(UserError, match="give cache_budget"):
            CompressedCache(model, method)
    else:
        with pytest.raises(UserError, match="has no budget"):
            CompressedCache(model, method, CacheBudget(100))


def test_tokens_are_taken_back_until_they_are_compressed(model, method):
    cache = CompressedCache(model, method, budget(method, 1000))
    before, _ = prompt(model, PROMPTS[:1, :40], cache)
    with torch.no_grad():
        model(PROMPTS[:1, 40:41], past_key_values=cache)
        cache.crop(-1)
        again = model(PROMPTS[:1, 40:41], past_key_values=cache).logits[:, -1]
        cache.crop(-1)
        other = model(PROMPTS[:1, 40:41], past_key_values=cache).logits[:, -1]
    assert torch.equal(again, other)
    assert not torch.equal(again, before)
