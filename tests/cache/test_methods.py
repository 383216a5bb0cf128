"""The fact that makes each method that method, on small cases."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, Place, Recent
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.evict.h2o import H2O
from hasten.accel.cache.evict.snapkv import SnapKV
from hasten.accel.cache.evict.streaming_llm import StreamingLLM
from hasten.accel.cache.full import Full
from hasten.accel.cache.quantize.fp8 import FP8
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.kernels.attention.contract import PLAIN

HEADS, TOKENS, SIZE = 2, 20, 8
PLACE = Place(0, 1, TOKENS, 8, PLAIN)


def recent(**changes):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS, TOKENS, SIZE, generator=generator) for _ in range(2))
    given = {"keys": keys, "values": values, "positions": torch.arange(TOKENS, dtype=torch.int32)}
    return Recent(**{**given, **changes})


def test_streaming_llm_keeps_the_first_and_the_last_tokens():
    kept = StreamingLLM(sinks=3, recent=2).compress([], recent(), PLACE)
    (segment,) = kept.segments
    assert segment.positions.tolist() == [[0, 1, 2, 15, 16, 17, 18, 19]] * HEADS
    assert kept.recent == 0


def test_an_evictor_keeps_keys_and_values_of_the_same_tokens_in_every_head():
    given = recent()
    segment = StreamingLLM(sinks=3).compress([], given, PLACE).segments[0]
    for name in ("keys", "values"):
        assert torch.equal(getattr(segment, name), getattr(given, name)[:, segment.positions[0].long()])


def test_h2o_keeps_the_tokens_with_the_most_attention_of_their_head():
    attention = torch.zeros(HEADS, TOKENS)
    attention[0, [5, 7]], attention[1, [9, 11]] = 1.0, 1.0
    kept = H2O(sinks=1, recent=0, recent_share=0.5).compress([], recent(attention=attention), PLACE)
    # A sink, half of the budget for the last tokens, the two heavy hitters, and the latest of equal ones.
    assert kept.segments[0].positions.tolist() == [
        [0, 5, 7, 15, 16, 17, 18, 19],
        [0, 9, 11, 15, 16, 17, 18, 19],
    ]


def test_the_attention_that_h2o_sums_is_that_of_all_queries_so_far():
    model = AutoModelForCausalLM.from_pretrained(resolve("embedded:target"), dtype=torch.float32).eval()
    tokens = torch.arange(30, 70)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens, output_attentions=True).attentions
    attach(model)
    cache = CompressedCache(model.config, H2O(), CacheBudget(1000))
    with torch.no_grad():
        model(tokens[:, :33], past_key_values=cache)
        for at in range(33, 40):
            model(tokens[:, at : at + 1], past_key_values=cache)
    for layer, attention in zip(cache.compressed, expected, strict=True):
        heads = model.config.num_key_value_heads
        summed = attention[0].unflatten(0, (heads, -1)).sum((1, 2))
        torch.testing.assert_close(layer.sequences[0]._attention, summed, rtol=1e-4, atol=1e-5)


def test_snapkv_keeps_the_neighbours_of_what_the_last_queries_attend_to():
    keys = torch.zeros(HEADS, TOKENS, SIZE)
    keys[:, 6, 0] = 50.0
    queries = torch.zeros(2, HEADS * 2, SIZE)
    queries[..., 0] = 1.0
    method = SnapKV(sinks=0, recent=0, window=2, kernel=5)
    kept = method.compress([], recent(keys=keys, queries=queries), PLACE)
    # The key, two neighbours on each side, the queries' own tokens, and the latest of the rest.
    assert kept.segments[0].positions[0].tolist() == [4, 5, 6, 7, 8, 17, 18, 19]


def test_kivi_packs_whole_blocks_and_leaves_the_last_tokens():
    method = KIVI(residual=4, block=8, bits=2)
    kept = method.compress([], recent(), PLACE)
    (segment,) = kept.segments
    assert (segment.tokens, kept.recent) == (16, 4)
    words = HEADS * SIZE * 2 // 32 * 16 * 4  # bytes of codes of keys, 16 rows of 32 bits
    scales = 2 * 2 * HEADS * SIZE * 4  # a scale and an offset for each channel of each of two blocks
    assert words + scales == segment.keys.words.nbytes + segment.keys.scale.nbytes + segment.keys.offset.nbytes


def test_kivi_keeps_the_other_channels_exact_where_one_channel_of_keys_is_an_outlier():
    given = recent()
    keys = given.keys.clone()
    keys[:, :, 3] = 100 + torch.arange(TOKENS)
    plain, outlier = (
        KIVI(residual=4, block=8, bits=4).compress([], recent(keys=part), PLACE).segments[0].dense()[0]
        for part in (given.keys, keys)
    )
    others = [channel for channel in range(SIZE) if channel != 3]
    assert torch.equal(plain[..., others], outlier[..., others])


def test_a_packed_token_is_never_packed_again():
    method = KIVI(residual=4, block=8, bits=2)
    first = method.compress([], recent(), PLACE)
    second = method.compress(first.segments, recent(), PLACE)
    before, after = first.segments[0].dense(), second.segments[0].dense()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:, : old.shape[1]], old)
    assert second.segments[0].tokens == 32


def test_fp8_has_its_own_scale_for_each_head():
    given = recent()
    keys = given.keys.clone()
    keys[1] *= 1000
    segment = FP8(residual=4, block=8).compress([], recent(keys=keys), PLACE).segments[0]
    assert segment.keys.dtype == torch.float8_e4m3fn
    found, expected = segment.dense()[0], keys[:, :16]
    assert float(((found - expected).abs() / expected.abs()).max()) < 2**-3
    torch.testing.assert_close(segment.key_scale[:, 0, 0], expected.abs().amax((1, 2)) / 448)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_is_of_the_tokens_of_the_sequence(share):
    assert CacheBudget(share).tokens(201) == math.ceil(201 * share)
    assert CacheBudget(64).tokens(201) == 64


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (lambda: CacheBudget(0), "cache_budget=0 is wrong"),
        (lambda: CacheBudget(1.5), "cache_budget=1.5 is wrong"),
        (lambda: SnapKV(kernel=4), "cache.kernel=4"),
        (lambda: KIVI(bits=5), "cache.bits=5"),
        (lambda: H2O(recent_share=1.0), "cache.recent_share=1.0"),
        (lambda: StreamingLLM(sinks=-1), "cache.sinks=-1"),
    ],
)
def test_a_wrong_value_is_named(made, wrong):
    with pytest.raises(UserError, match=wrong):
        made()


@pytest.fixture(scope="module")
def divergences():
    """KL divergence from the full cache of 64 tokens behind 400 tokens of text, by method, on the trained target."""
    folder = resolve("embedded:target")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = open(torch.utils.__file__).read() + open(torch.overrides.__file__).read()  # noqa: SIM115
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)(text).input_ids[:464]])
    attach(model)

    def log_probs(method, budget):
        cache = CompressedCache(model.config, method, budget)
        with torch.no_grad():
            model(tokens[:, :400], past_key_values=cache)
            parts = [model(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(400, 464)]
        return torch.cat(parts, 1).log_softmax(-1)

    full = log_probs(Full(), None)

    def divergence(method, budget=None):
        other = log_probs(method, None if budget is None else CacheBudget(budget))
        return float((full.exp() * (full - other)).sum(-1).mean())

    return divergence


def test_fewer_bits_and_smaller_budgets_cost_more_on_the_trained_target(divergences):
    assert divergences(KIVI(bits=8)) < divergences(KIVI(bits=4)) < divergences(KIVI(bits=2))
    assert divergences(FP8()) < divergences(KIVI(bits=2))
    assert divergences(SnapKV(), 200) < divergences(SnapKV(), 40)


def test_what_the_queries_attend_to_is_worth_more_than_any_tokens(divergences):
    """SnapKV's claim, against the same number of tokens chosen by the norm of their keys."""

    class ByNorm(StreamingLLM):
        def score(self, tokens):
            return tokens.keys.norm(dim=-1)

    assert divergences(SnapKV(recent=0), 64) < divergences(ByNorm(recent=0), 64)


def test_a_segment_is_a_view_of_nothing():
    segment = StreamingLLM().compress([], recent(), PLACE).segments[0]
    assert isinstance(segment, Dense)
    assert segment.nbytes == HEADS * 8 * (2 * SIZE * 4 + 4)
