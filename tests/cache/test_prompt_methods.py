"""The facts that make methods which read prompts those methods."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, Lookahead, Place, Recent
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.draft import DraftModel
from hasten.accel.cache.evict.snapkv import SnapKV
from hasten.accel.cache.full import Full
from hasten.accel.cache.prompt.ape import APE
from hasten.accel.cache.prompt.base import Prompt
from hasten.accel.cache.prompt.hydragen import Hydragen
from hasten.accel.cache.prompt.speckv import SpecKV
from hasten.accel.cache.prompt.specpc import SpecPC
from hasten.accel.cache.prompts import prefill
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets.cached import CachedTarget
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.kernels.attention.contract import PLAIN

NEW = 8


@pytest.fixture(scope="module")
def models():
    """The trained target, its draft model, and tokens of a Python file."""
    names = ("embedded:target", "embedded:draft")
    target, draft = (AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval() for name in names)
    tokens = AutoTokenizer.from_pretrained(resolve(names[0]))(Path(torch.overrides.__file__).read_text()).input_ids
    return target, draft, tokens[:600]


def filled(model, method, tokens, budget=None, **options):
    """A cache with a prompt, and the logits behind it."""
    cache = CompressedCache(model, method, None if budget is None else CacheBudget(budget))
    logits = prefill(model, cache, torch.tensor([tokens]), **{"max_new_tokens": NEW, "leave": 0, **options})
    return cache, logits[0]


class Answers:
    """A draft model with given answers."""

    def __init__(self, expected=(), attention=()):
        self.expected, self.rows = list(expected), list(attention)

    def continuation(self, tokens, count):
        return self.expected[:count]

    def attention(self, tokens, window, steps):
        return self.rows


def test_speckv_keeps_what_only_the_expected_tokens_attend_to():
    keys = torch.zeros(1, 20, 8)
    keys[0, 6, 0] = 50.0
    queries, ahead = torch.zeros(2, 2, 8), torch.zeros(3, 2, 8)
    ahead[1, 1, 0] = 1.0  # one token, and one of the two query heads
    positions = torch.arange(20, dtype=torch.int32)
    scores = torch.einsum("whd,td->wht", ahead, keys[0]) / 8**0.5
    lookahead = Lookahead(ahead, torch.arange(20, 23, dtype=torch.int32), scores.logsumexp(-1))
    options = {"sinks": 0, "recent": 0, "window": 2, "kernel": 3}
    place = Place(0, 1, 20, 5, PLAIN)
    kept = []
    for method in (SpecKV(**options), SnapKV(**options)):
        given = Recent(keys, keys, positions, queries, lookahead=lookahead)
        kept.append(method.compress([], given, place).segments[0].positions[0].tolist())
    # The key with its neighbours and the last two tokens; without the draft, some of equal ones.
    assert kept[0] == [5, 6, 7, 18, 19]
    assert 6 not in kept[1]


def test_speckv_s_importance_is_the_largest_attention_of_window_and_lookahead(models, monkeypatch):
    target, _, tokens = models
    tokens, expected = tokens[:150], tokens[150:155]
    method = SpecKV(sinks=0, recent=0, window=8, kernel=5)
    target.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = target(torch.tensor([[*tokens, *expected]]), output_attentions=True).attentions
    attach(target)
    monkeypatch.setattr("hasten.accel.cache.prompts.DraftModel", lambda *_: Answers(expected))
    cache, _ = filled(target, method, tokens, 60)
    for layer, attention in zip(cache.compressed, attentions, strict=True):
        largest = attention[0].unflatten(0, (2, -1))[:, :, -13:, :142].amax((1, 2))
        pooled = torch.nn.functional.max_pool1d(largest[:, None], 5, 1, 2)[:, 0]
        sequence = layer.sequences[0]
        assert (sequence.length, sequence.tokens) == (150, 60)
        held = sequence.segments[0].positions.long()
        assert torch.equal(held[:, -8:], torch.arange(142, 150).expand(2, -1))
        least = pooled.gather(1, held[:, :-8]).amin(1)
        dropped = pooled.scatter(1, held[:, :-8], 0.0).amax(1)
        assert (least >= dropped - 1e-5).all()


def test_a_draft_model_tells_its_own_attention_and_its_greedy_tokens(models):
    _, draft, tokens = models
    tokens = tokens[:70]
    answers = DraftModel(draft, draft.config.vocab_size)
    expected = answers.continuation(tokens, 5)
    found = answers.attention(tokens, 16, 1)
    draft.set_attn_implementation("eager")
    with torch.no_grad():
        out = draft(torch.tensor([[*tokens, *expected]]), output_attentions=True)
    attach(draft)
    assert out.logits[0, 69:-1].argmax(-1).tolist() == expected
    for own, attention in zip(found, out.attentions, strict=True):
        torch.testing.assert_close(own, attention[0, :, 54:71, :70], rtol=1e-4, atol=1e-5)


def test_specpc_takes_the_best_tokens_with_their_neighbours_and_the_last_ones():
    importance = torch.zeros(40)
    importance[10], importance[25] = 2.0, 1.0
    method = SpecPC(window=4, kernel=1, neighbours=4)
    # Neighbours of a token are the one before it and the two behind it; the budget cuts off the farthest ones.
    assert method.choose(importance, 12) == [9, 10, 11, 12, 24, 25, 26, 27, 36, 37, 38, 39]
    assert method.choose(importance, 7) == [9, 10, 11, 36, 37, 38, 39]


def test_specpc_counts_the_largest_attention_of_the_later_layers_and_weighs_late_queries():
    first, later = torch.zeros(1, 4, 10), torch.zeros(1, 4, 10)
    first[0, -1, 1] = 1.0  # a layer that does not count
    later[0, 0, 2] = 1.0  # the first query of the window has the weight 0
    later[0, 1, 3], later[0, 3, 5] = 0.9, 0.5  # 0.9 at the weight 1/2, and the drafted token's at 1
    method = SpecPC(window=3, kernel=1, neighbours=0, skipped=0.5)
    answers = Answers(attention=[first, later])
    for budget, kept in ((4, [5, 7, 8, 9]), (5, [3, 5, 7, 8, 9])):
        assert method.read(Prompt(range(10), 0, 8), answers, budget).kept == kept


def test_specpc_runs_only_what_it_chose_at_the_positions_of_the_text(models):
    target, draft, tokens = models
    ran = []
    attach(target)
    handle = target.model.register_forward_pre_hook(
        lambda module, given, named: ran.extend(named["position_ids"][0].tolist()), with_kwargs=True
    )
    cache, logits = filled(target, SpecPC(), tokens[:300], 0.5, draft=draft)
    handle.remove()
    for layer in cache.compressed:
        assert layer.sequences[0].uncompressed().positions.tolist() == ran
    assert len(ran) == 150
    assert ran == sorted(set(ran))
    assert ran[-64:] == list(range(236, 300))
    with torch.no_grad():
        own = target(torch.tensor([[tokens[place] for place in ran]]), position_ids=torch.tensor([ran])).logits[0, -1]
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)


def test_the_engine_and_generate_give_the_same_tokens(models):
    target, draft, tokens = models
    for method in (SpecKV(), SpecPC()):
        cache, _ = filled(target, method, tokens[:120], 0.6, draft=draft, leave=1)
        ids = torch.tensor([tokens[:120]])
        expected = target.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False)[0, 120:].tolist()
        engine = Engine(CachedTarget(target, method, CacheBudget(0.6), draft=draft))
        (result,) = engine.decode([Request("0", tokens[:120], NEW)])
        assert result.token_ids == expected


def test_a_method_that_reads_prompts_refuses_one_that_it_did_not_read(models):
    target, _, tokens = models
    attach(target)
    with pytest.raises(UserError, match="fill the cache with"):
        target(torch.tensor([tokens[:20]]), past_key_values=CompressedCache(target, Hydragen()))


def shared_prompts(tokens):
    """Three prompts: all begin with 100 equal tokens, two of them with 180."""
    return [tokens[:180] + tokens[200:220], tokens[:100] + tokens[300:330], tokens[:180] + tokens[400:440]]


def target_with(model, method, prompts):
    """A target that holds prompts."""
    target = CachedTarget(model, method)
    target.reserve(len(prompts), 300)
    for slot, prompt in enumerate(prompts):
        target.begin_prompt(slot, prompt, NEW)
        target.prefill(slot, prompt[:-1], 64)
        target.end_prompt(slot)
    return target


def test_hydragen_holds_a_common_prefix_once_and_a_longer_one_of_fewer_sequences_behind_it(models):
    model, _, tokens = models
    prompts = shared_prompts(tokens)
    target, full = (target_with(model, method, prompts) for method in (Hydragen(), Full()))
    for layer in target._compressed.compressed:
        one, two, three = (sequence.segments for sequence in layer.sequences)
        assert [[segment.tokens for segment in segments] for segments in (one, two, three)] == [
            [100, 80],
            [100],
            [100, 80],
        ]
        assert one[0] is two[0] is three[0]
        assert one[1] is three[1]
    positions = 4 * (2 * 180 + 29 + 19 + 39)  # a segment has them for each of two heads
    token_bytes = 2 * 2 * 64 * 4
    held = 4 * ((180 + 29 + 19 + 39) * token_bytes)
    # Room for tokens to come is held, too, and counted.
    assert held < target.cache_bytes < 1.3 * (held + 4 * positions) < 0.7 * full.cache_bytes
    target.clear(0)
    target.clear(2)
    # What nobody else holds is freed with them.
    assert target.cache_bytes < 4 * (100 + 2 * 64) * (token_bytes + 8)


def test_hydragen_reads_a_prefix_once_for_all_sequences_and_gives_the_full_cache_s_logits(models, monkeypatch):
    model, _, tokens = models
    prompts = shared_prompts(tokens)
    read = []
    attend = Dense.attend
    monkeypatch.setattr(
        Dense, "attend", lambda self, *given: read.append((self.tokens, len(given[0]))) or attend(self, *given)
    )
    found = []
    for method in (Hydragen(), Full()):
        target = target_with(model, method, prompts)
        read.clear()
        rows = target.forward([0, 1, 2], [[prompt[-1], 5] for prompt in prompts], [[-1, 0]] * 3)
        found.append(rows.logits)
        # In each of four layers: 6 queries read the first 100 tokens, 4 the next 80.
        assert read == ([] if isinstance(method, Full) else [(100, 6), (80, 4)] * 4)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)  # float32, in another order


def test_sequences_that_share_prefixes_decode_the_full_cache_s_tokens(models):
    model, _, tokens = models
    requests = [Request(str(number), prompt, NEW) for number, prompt in enumerate(shared_prompts(tokens))]
    decoded = []
    for method, drafts in ((Full(), 0), (Hydragen(), 4)):
        drafter = PromptLookup(min_ngram=1) if drafts else None
        engine = Engine(CachedTarget(model, method), drafter, policy=Fixed(drafts), in_flight=3, prefill_chunk=64)
        decoded.append({result.id: result.token_ids for result in engine.decode(requests)})
    assert decoded[1] == decoded[0]


def test_padded_prompts_of_a_batch_share_their_prefix_in_generate(models):
    model, _, tokens = models
    prompts = shared_prompts(tokens)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    outputs = []
    for method in (Hydragen(), Full()):
        cache = CompressedCache(model, method)
        if isinstance(method, Hydragen):
            prefill(model, cache, ids, mask, max_new_tokens=4)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        outputs.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **options))
        segments = {id(segment) for sequence in next(cache.compressed).sequences for segment in sequence.segments}
        assert len(segments) == (2 if isinstance(method, Hydragen) else 0)
    assert torch.equal(*outputs)


def test_prefixes_below_the_shortest_are_not_shared(models):
    model, _, tokens = models
    for count, shared in ((63, 0), (64, 64)):
        target = target_with(model, Hydragen(), [tokens[:70], tokens[:count] + tokens[300:310]])
        held = next(target._compressed.compressed).sequences[1].segments
        assert sum(segment.tokens for segment in held) == shared


def test_ape_with_one_context_and_no_temperature_is_plain_attention(models):
    target, _, tokens = models
    expected = next_logits(target, CompressedCache(target, Full()), tokens[:200])
    for method, same in ((APE(1.0, 1.0), True), (APE(), False)):
        cache, _ = filled(target, method, tokens[:150], contexts=(3, 120))
        found = next_logits(target, cache, tokens[150:200])
        assert torch.allclose(found, expected, rtol=0, atol=1e-4) == same


def next_logits(model, cache, tokens):
    """Logits behind tokens that are added to a cache."""
    attach(model)
    with torch.no_grad():
        return model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1]


def test_ape_s_contexts_do_not_see_each_other_and_have_the_same_positions(models):
    target, _, tokens = models
    begin, one, two, question = tokens[:5], tokens[100:150], tokens[200:230], tokens[300:320]
    logits = []
    for contexts in ((one, two), (two, one)):
        bounds = (5, 5 + len(contexts[0]), 85)
        cache, _ = filled(target, APE(), [*begin, *contexts[0], *contexts[1], *question], contexts=bounds)
        assert cache.get_seq_length() == 5 + 50 + 20
        logits.append(next_logits(target, cache, tokens[320:321]))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_ape_multiplies_the_log_sum_exp_of_scores_at_its_temperature():
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(1, count, 4, generator=generator) for count in (6, 6, 1))
    positions = torch.arange(6, dtype=torch.int32)[None]
    segment = APE(0.5, 0.8).contexts(keys, values, positions)
    partial = segment.attend(queries, torch.tensor([9]), PLAIN)
    scores = (keys[0] @ queries[0, 0]) / 4**0.5 / 0.5
    torch.testing.assert_close(partial.m[0, 0] + partial.l[0, 0].log(), scores.logsumexp(0) * 0.8 * 0.5)
    torch.testing.assert_close(partial.o[0, 0] / partial.l[0, 0], scores.softmax(0) @ values[0])


def test_contexts_are_refused_where_they_are_missing_or_of_no_use(models):
    target, _, tokens = models
    cases = [
        (APE(), (), "reads contexts"),
        (APE(), (0, 5, 5), "must ascend, up to the 19 tokens"),
        (APE(), (0, 20), "must ascend, up to the 19 tokens"),
        (Full(), (0, 5), "has no use for contexts"),
    ]
    for method, contexts, wrong in cases:
        engine = Engine(CachedTarget(target, method))
        with pytest.raises(UserError, match=wrong):
            list(engine.decode([Request("0", tokens[:20], NEW, contexts=contexts)]))
