"""The fact that makes each method that method, on small cases."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, Place, Recent
from hasten.accel.cache.budgets.prefixkv import PrefixKV, layer_counts
from hasten.accel.cache.budgets.pyramid import Pyramid
from hasten.accel.cache.budgets.uncomp import UNComp, entropy
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.evict.base import pooled
from hasten.accel.cache.evict.h2o import H2O
from hasten.accel.cache.evict.snapkv import SnapKV
from hasten.accel.cache.evict.streaming_llm import StreamingLLM
from hasten.accel.cache.full import Full
from hasten.accel.cache.merge.chelsea import Chelsea
from hasten.accel.cache.merge.d2o import D2O
from hasten.accel.cache.merge.ems import EMS
from hasten.accel.cache.prune.mustafar import Mustafar
from hasten.accel.cache.quantize.fp8 import FP8
from hasten.accel.cache.quantize.gear import GEAR
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.cache.quantize.kvquant import KVQuant
from hasten.accel.cache.quantize.mikv import MiKV
from hasten.accel.cache.quantize.rotatekv import RotateKV
from hasten.accel.cache.quantize.zipvl import ZipVL
from hasten.accel.cache.retrieve.double_sparsity import DoubleSparsity
from hasten.accel.cache.retrieve.loop_serve import LoopServe
from hasten.accel.cache.retrieve.lserve import LServe
from hasten.accel.cache.retrieve.tidal_decode import TidalDecode
from hasten.accel.cache.rotary import rotary_of
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.interpolated import interpolated
from hasten.accel.cache.segments.nonuniform import centroids_of
from hasten.accel.cache.segments.packed import PackedSegment
from hasten.accel.cache.segments.ragged import Ragged
from hasten.accel.cache.sequence import NewTokens, SequenceCache
from hasten.accel.cache.share.minicache import MiniCache
from hasten.accel.cache.share.xkv import XKV
from hasten.accel.decoding.targets.cached import CachedTarget
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.kernels.attention.contract import PLAIN
from hasten.kernels.quantize_pack import quantize_pack, unpack_dequantize
from tests.models import tiny

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


@pytest.mark.parametrize("window", [None, tiny.WINDOW])
def test_the_attention_that_h2o_sums_is_that_of_all_queries_so_far(window):
    if window is None:
        model = AutoModelForCausalLM.from_pretrained(resolve("embedded:target"), dtype=torch.float32).eval()
    else:
        model = tiny.build("mistral").eval()
        assert model.config.sliding_window == window
    tokens = torch.arange(3, 80)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens, output_attentions=True).attentions
    attach(model)
    cache = CompressedCache(model, H2O(), CacheBudget(1000))
    with torch.no_grad():
        model(tokens[:, :33], past_key_values=cache)
        for at in range(33, tokens.shape[1]):
            model(tokens[:, at : at + 1], past_key_values=cache)
    for layer, attention in zip(cache.compressed, expected, strict=True):
        heads = model.config.num_key_value_heads
        summed = attention[0].unflatten(0, (heads, -1)).sum((1, 2))
        held = layer.sequences[0].uncompressed()
        torch.testing.assert_close(held.attention, summed, rtol=1e-4, atol=1e-5)


def test_summed_attention_does_not_depend_on_the_passes_that_committed_the_queries():
    generator = torch.Generator().manual_seed(5)
    count, heads = 150, HEADS
    keys, values = (torch.randn(heads, count, SIZE, generator=generator) for _ in range(2))
    queries = torch.randn(count, heads * 2, SIZE, generator=generator)
    positions = torch.arange(count, dtype=torch.int32)

    def summed(widths):
        sequence, begin = SequenceCache(H2O()), 0
        for width in widths:
            part = slice(begin, begin + width)
            new = NewTokens(keys[:, part], values[:, part], queries[part], positions[part])
            sequence.append(new, PLAIN, None, torch.float32)
            sequence.commit()
            begin += width
        assert begin == count
        return sequence

    one = summed([40] + [1] * 110)
    other = summed([40] + [3, 1, 5, 2] * 10)
    torch.testing.assert_close(one.uncompressed().attention, other.uncompressed().attention, rtol=1e-6, atol=1e-6)
    # Queries that are taken back give nothing.
    taken = summed([40] + [1] * 110)
    waiting = sum(len(rows) for rows, _ in taken._unsummed)
    assert 0 < waiting < 32
    taken.crop(waiting)
    shorter = SequenceCache(H2O())
    left = count - waiting
    shorter.append(
        NewTokens(keys[:, :left], values[:, :left], queries[:left], positions[:left]), PLAIN, None, torch.float32
    )
    shorter.commit()
    torch.testing.assert_close(taken.uncompressed().attention, shorter.uncompressed().attention, rtol=1e-5, atol=1e-6)


def test_snapkv_keeps_the_neighbours_of_what_the_last_queries_attend_to():
    keys = torch.zeros(HEADS, TOKENS, SIZE)
    keys[:, 6, 0] = 50.0
    queries = torch.zeros(2, HEADS * 2, SIZE)
    queries[..., 0] = 1.0
    method = SnapKV(sinks=0, recent=0, window=2, kernel=5)
    kept = method.compress([], recent(keys=keys, queries=queries), PLACE)
    # The key, two neighbours on each side, the queries' own tokens, and the latest of the rest.
    assert kept.segments[0].positions[0].tolist() == [4, 5, 6, 7, 8, 17, 18, 19]


def test_snapkv_pools_the_average_over_the_neighbours_that_there_are():
    attention = torch.tensor([[6.0, 0, 0, 3, 0, 9]])
    first = torch.tensor([[False] * 5 + [True]])
    torch.testing.assert_close(
        pooled(attention, first, 3, "average"), torch.tensor([[3.0, 2.0, 1.0, 1.0, 1.5, torch.inf]])
    )
    torch.testing.assert_close(pooled(attention, first, 3, "max"), torch.tensor([[6.0, 6.0, 3.0, 3.0, 3.0, torch.inf]]))


def test_snapkv_keeps_what_one_of_the_query_heads_attends_to():
    keys = torch.zeros(HEADS, TOKENS, SIZE)
    keys[..., 3] = -100.0
    for token, part in ((5, 0), (9, 1), (19, 2)):
        keys[:, token] = torch.eye(SIZE)[part]
    queries = torch.zeros(1, HEADS, 2, SIZE)
    # One head attends to token 5 and less to token 9, and so does the other to the last token and to token 9.
    queries[..., 0, :4] = torch.tensor([0.6, 0.4, 1e-9, torch.e]).log()
    queries[..., 1, :4] = torch.tensor([1e-9, 0.4, 0.6, torch.e]).log()
    method = SnapKV(sinks=0, recent=0, window=1, kernel=1)
    given = recent(keys=keys, queries=queries.flatten(1, 2) * SIZE**0.5)
    kept = method.compress([], given, replace(PLACE, budget=2))
    assert kept.segments[0].positions.tolist() == [[5, 19]] * HEADS


def test_snapkv_leaves_most_of_a_small_budget_to_what_its_window_attends_to():
    keys = torch.zeros(HEADS, TOKENS, SIZE)
    keys[:, 1, 0] = 50.0
    queries = torch.zeros(16, HEADS * 2, SIZE)
    queries[..., 0] = 1.0
    kept = SnapKV(sinks=0, recent=0, window=16, kernel=1).compress([], recent(keys=keys, queries=queries), PLACE)
    # Of eight tokens the window has the last two in any case, and not all.
    assert {1, 18, 19} <= set(kept.segments[0].positions[0].tolist())


def test_snapkv_reads_the_last_queries_of_the_prompt_and_then_those_since():
    read = []

    class Recording(SnapKV):
        def score(self, tokens):
            read.append((tokens.positions.shape[1], len(tokens.queries)))
            return super().score(tokens)

    model = tiny.build("llama")
    attach(model)
    tokens = torch.randint(3, tiny.VOCABULARY, (1, 122), generator=torch.Generator().manual_seed(3))
    cache = CompressedCache(model, Recording(), CacheBudget(40))
    layers = len(cache.layers)
    with torch.no_grad():
        model(tokens[:, :90], past_key_values=cache)
        # They would take as many bytes as 64 tokens.
        assert all(layer.sequences[0]._queries is None for layer in cache.compressed)
        for at in range(90, 122):
            model(tokens[:, at : at + 1], past_key_values=cache)
    assert read == [(90, 64)] * layers + [(72, 32)] * layers


@pytest.mark.parametrize(
    ("budget", "interval"), [(None, 32), (40, 32), (1000, 32), (1023, 32), (1024, 64), (3750, 128)]
)
def test_an_evictor_is_applied_more_rarely_with_a_large_budget(budget, interval):
    assert StreamingLLM().interval_of(budget) == interval
    assert budget is None or interval == 32 or interval <= budget / 16


def test_the_interval_is_that_of_the_prompts_budget():
    class Often(StreamingLLM):
        interval = 2

    model = tiny.build("llama", max_position_embeddings=1024)
    attach(model)
    tokens = torch.randint(3, tiny.VOCABULARY, (1, 136), generator=torch.Generator().manual_seed(3))
    cache = CompressedCache(model, Often(), CacheBudget(0.5))
    held = []
    with torch.no_grad():
        model(tokens[:, :128], past_key_values=cache)
        for at in range(128, 136):
            held.append([layer.sequences[0].tokens for layer in cache.compressed])
            model(tokens[:, at : at + 1], past_key_values=cache)
    # Half of 128 tokens, and every fourth time half of all.
    assert held == [[count] * len(cache.layers) for count in (64, 65, 66, 67, 66, 67, 68, 69)]
    target = CachedTarget(model, Often(), CacheBudget(0.5))
    target.reserve(1, 200)
    target.prefill(0, tokens[0, :128].tolist())
    target.end_prompt(0)
    assert target.room(0) == 4


def test_kivi_packs_whole_blocks_and_leaves_the_last_tokens():
    method = KIVI(residual=4, block=8, bits=2)
    kept = method.compress([], recent(), PLACE)
    (segment,) = kept.segments
    assert (segment.tokens, kept.recent) == (16, 4)
    words = HEADS * SIZE * 2 // 32 * 16 * 4  # bytes of codes of keys, 16 rows of 32 bits
    scales = 2 * 2 * HEADS * SIZE * 2  # a scale and an offset, of 16 bits, for each channel of each of two blocks
    assert words + scales == segment.keys.words.nbytes + segment.keys.scale.nbytes + segment.keys.offset.nbytes


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_holds_its_codes_grids_of_16_bits_and_the_last_tokens_alone(bits):
    count, size, method = 2000, 64, KIVI(bits=bits)
    keys, values = (torch.randn(HEADS, count, size, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    held = SequenceCache(method)
    held.fill(NewTokens(keys, values, torch.zeros(count, HEADS, size), torch.arange(count, dtype=torch.int32)))
    held.keep(method.compress([], held.uncompressed(), PLACE))
    packed, last = 1952, 48  # whole blocks of 32 behind which 32 tokens are left
    numbers = 2 * HEADS * size
    grids = numbers // 2 // 32 + 2 * HEADS // 2  # groups of 32 tokens of a channel, of 64 numbers of a token
    dense = last * (4 * numbers + 4)  # with their positions
    assert held.nbytes == packed * (numbers * bits // 8 + grids * 2 * 2) + dense
    # Room for tokens to come is a part of the residual.
    new = NewTokens(keys[:, :1], values[:, :1], torch.zeros(1, HEADS, size), torch.tensor([count], dtype=torch.int32))
    before = held.nbytes
    held.fill(new)
    assert held.nbytes - before == 16 * (4 * numbers + 4)


def test_a_packed_segment_holds_positions_only_where_they_do_not_follow_each_other():
    given = recent()
    part = given.keys[:, :8], given.values[:, :8]

    def segment(positions):
        return PackedSegment.of(*part, torch.tensor(positions, dtype=torch.int32).expand(HEADS, -1), 4, 8)

    first, second, apart = (segment([*range(begin, begin + 8)]) for begin in (3, 11, 20))
    gaps = segment([0, 1, 2, 3, 5, 6, 7, 8])
    assert gaps.nbytes == first.nbytes + 8 * 4
    for held, positions in (
        (first, [*range(3, 11)]),
        (gaps, [0, 1, 2, 3, 5, 6, 7, 8]),
        (first.extended(second), [*range(3, 19)]),
        (first.extended(apart), [*range(3, 11), *range(20, 28)]),
        (gaps.extended(second), [0, 1, 2, 3, 5, 6, 7, 8, *range(11, 19)]),
    ):
        assert held.tokens == len(positions)
        assert held.dense()[2].dtype == torch.int32
        assert held.dense()[2].tolist() == [positions] * HEADS
    assert first.extended(second).nbytes == 2 * first.nbytes
    assert first.extended(apart).nbytes == 2 * first.nbytes + 16 * 4


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


def test_mustafar_keeps_the_largest_elements_of_every_vector():
    given = recent()
    segment = Mustafar(residual=4, block=8, key_sparsity=0.75).compress([], given, PLACE).segments[0]
    keys = given.keys[:, :16]
    largest = keys.abs().topk(2, -1).indices
    expected = torch.zeros_like(keys).scatter(-1, largest, keys.gather(-1, largest))
    assert torch.equal(segment.dense()[0], expected)
    assert (segment.dense()[1] != 0).sum(-1).eq(4).all()
    assert segment.keys.values.nbytes + segment.keys.bitmap.nbytes == HEADS * 16 * (2 * 4 + 1)


def test_gear_corrects_most_of_what_its_bits_lose():
    given = recent(
        keys=torch.randn(HEADS, 64, 32, generator=torch.Generator().manual_seed(2)),
        values=torch.randn(HEADS, 64, 32, generator=torch.Generator().manual_seed(3)),
        positions=torch.arange(64, dtype=torch.int32),
    )
    place = Place(0, 1, 64, None, PLAIN)
    errors = []
    for method in (KIVI(residual=0, block=64), GEAR(residual=0, rank=0), GEAR(residual=0), GEAR(residual=0, rank=32)):
        segment = method.compress([], given, place).segments[0]
        errors.append(float((segment.dense()[0] - given.keys).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[3] < 1e-4 * errors[0]  # at full rank only the rounding of the factors remains


def test_d2o_merges_an_evicted_token_by_its_similarity_and_drops_what_is_unlike_all():
    keys = torch.zeros(1, 4, 2)
    keys[0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, -1.0]])
    values = torch.tensor([[[1.0], [2.0], [4.0], [100.0]]])
    attention = torch.tensor([[9.0, 8.0, 1.0, 0.0]])
    given = Recent(keys, values, torch.arange(4, dtype=torch.int32), None, attention)
    kept = D2O(sinks=0, recent=0).compress([], given, Place(0, 1, 4, 2, PLAIN))
    (segment,) = kept.segments
    assert segment.positions.tolist() == [[0, 1]]
    # The third token has the cosine 0.8 with the second, the fourth at most -0.7; the threshold is their mean.
    torch.testing.assert_close(kept.memory, torch.tensor([(0.8 - 0.5**0.5) / 2]))
    torch.testing.assert_close(segment.values[0], torch.tensor([[1.0], [(2 + 0.8 * 4) / 1.8]]))


def test_ems_merges_the_next_band_and_drops_the_rest():
    keys = torch.zeros(1, 4, 2)
    keys[0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    values = torch.tensor([[[1.0], [2.0], [3.0], [100.0]]])
    given = Recent(
        keys, values, torch.arange(4, dtype=torch.int32), torch.zeros(1, 1, 2), torch.tensor([[9.0, 8, 7, 1]])
    )
    method = EMS(sinks=0, recent=0, window=1, merged=0.5)
    (segment,) = method.compress([], given, Place(0, 1, 4, 2, PLAIN)).segments
    assert segment.values[0, :, 0].tolist() == [2.0, 2.0]  # the first is the mean of 1 and 3


def test_merging_equal_keys_changes_no_attention():
    generator = torch.Generator().manual_seed(5)
    single = torch.randn(HEADS, 8, SIZE, generator=generator)
    keys, values = (part.repeat_interleave(2, 1) for part in (single, torch.randn_like(single)))
    given = Recent(keys, values, torch.arange(16, dtype=torch.int32))
    queries = torch.randn(3, HEADS * 2, SIZE, generator=generator)
    (segment,) = Chelsea(sinks=0, recent=0).compress([], given, Place(0, 1, 16, 8, PLAIN)).segments
    assert segment.tokens == 8
    assert segment.counts.eq(2).all()
    positions = torch.arange(16, 19)
    whole = Dense(keys, values, given.positions.expand(HEADS, -1)).attend(queries, positions, PLAIN)
    merged = segment.attend(queries, positions, PLAIN)
    torch.testing.assert_close(merged.o / merged.l[..., None], whole.o / whole.l[..., None])


def test_double_sparsity_takes_the_channels_in_which_queries_and_keys_are_large():
    given = recent(queries=torch.ones(4, HEADS * 2, SIZE))
    keys = given.keys.clone()
    keys[0, :, [1, 6]], keys[1, :, [0, 3]] = 9.0, -9.0
    method = DoubleSparsity(recent=2)
    segment = method.compress([], recent(keys=keys, queries=given.queries), PLACE).segments[0]
    assert segment.channels.tolist() == [[1, 6], [0, 3]]


def test_with_all_channels_double_sparsity_reads_the_tokens_of_the_largest_scores():
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(4, HEADS, SIZE, generator=generator)
    segment = DoubleSparsity(recent=0, channels=1.0).compress([], recent(queries=queries), PLACE).segments[0]
    exact = torch.einsum("whd,htd->hwt", queries, segment.keys).topk(4, -1).indices
    chosen = segment.choose(queries, PLAIN)
    # 4 bits may exchange tokens at the end of the eight, and none of the first four.
    assert all(set(best.tolist()) <= set(own.tolist()) for best, own in zip(exact[0], chosen[0], strict=True))


def test_no_token_of_a_page_has_a_larger_score_than_its_bound():
    generator = torch.Generator().manual_seed(7)
    segment = LServe(recent=0, page=8, parts=2).compress([], recent(), PLACE).segments[0]
    queries = torch.randn(5, HEADS, SIZE, generator=generator)
    scores = torch.einsum("whd,htd->hwt", queries, segment.keys)
    bounds = torch.einsum("whd,hpsd->hwps", queries.clamp(min=0), segment.high)
    bounds += torch.einsum("whd,hpsd->hwps", queries.clamp(max=0), segment.low)
    of_tokens = bounds.flatten(2).repeat_interleave(4, -1)[..., :TOKENS]
    assert (scores <= of_tokens + 1e-5).all()
    assert (segment.keys[:, 16:].amin(1) == segment.low[:, 2, 0]).all()  # the last page has four tokens


def test_lserve_reads_the_page_of_the_key_that_a_query_asks_for():
    keys = recent().keys * 0.1
    keys[:, 11, 0] = 20.0
    segment = (
        LServe(recent=0, page=4, parts=2).compress([], recent(keys=keys), Place(0, 1, TOKENS, 4, PLAIN)).segments[0]
    )
    query = torch.zeros(1, HEADS, SIZE)
    query[..., 0] = 1.0
    assert segment.choose(query, PLAIN).tolist() == [[[8, 9, 10, 11]]] * HEADS


def test_layers_of_tidal_decode_read_what_an_earlier_layer_chose():
    shared = {}
    method = TidalDecode(recent=0, dense=1)
    segments = [
        method.compress([], recent(), Place(layer, 4, TOKENS, 3, PLAIN, shared)).segments[0] for layer in range(4)
    ]
    assert [type(segment).__name__ for segment in segments] == ["Dense", *["SharedChoice"] * 3]
    assert [segment.chooses for segment in segments[1:]] == [True, True, False]
    queries = torch.randn(2, HEADS, SIZE, generator=torch.Generator().manual_seed(8))
    positions = torch.tensor([20, 21])
    partial = segments[1].attend(queries, positions, PLAIN)
    torch.testing.assert_close(partial.o, Dense.attend(segments[0], queries, positions, PLAIN).o)
    best = torch.einsum("whd,htd->hwt", queries, segments[1].keys).topk(3, -1).indices
    assert torch.equal(segments[3].choose(queries, PLAIN).sort(-1).values, best.sort(-1).values)


def test_loop_serve_reads_what_the_last_queries_attended_to():
    keys = torch.zeros(HEADS, TOKENS, SIZE)
    keys[:, [2, 9], 0] = 30.0
    queries = torch.zeros(2, HEADS, SIZE)
    queries[..., 0] = 1.0
    segment = LoopServe(recent=2, every=2).compress([], recent(keys=keys, queries=queries), PLACE).segments[0]
    assert {2, 9} <= set(segment.chosen[0].tolist())


def layers_of(count, **changes):
    """What a method that joins layers gets of `count` layers, and a rotation that changes nothing."""
    given = []
    for layer in range(count):
        generator = torch.Generator().manual_seed(layer)
        keys, values = (torch.randn(HEADS, TOKENS, SIZE, generator=generator) for _ in range(2))
        place = Place(layer, count, TOKENS, None, PLAIN, {}, lambda keys, positions, inverse: keys)
        given.append(([], recent(**{"keys": keys, "values": values, **changes}), place))
    return given


def test_minicache_s_direction_lies_on_the_arc_and_lengths_are_the_layers_own():
    upper, lower = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    above, below = interpolated(upper, lower, share=0.6, spread=0.0)
    angle = 0.6 * math.pi / 2
    torch.testing.assert_close(above.dense(1), 3 * torch.tensor([[[math.cos(angle), math.sin(angle)]]]))
    torch.testing.assert_close(below.dense(1), 2 * torch.tensor([[[math.cos(angle), math.sin(angle)]]]))
    assert above.direction is below.direction


def test_minicache_keeps_the_vectors_of_the_least_similar_tokens():
    given = layers_of(4)
    kept = MiniCache(recent=0, spread=0.3).compress_layers(given)
    assert kept[:2] == [None, None]
    for layer in (2, 3):
        part = kept[layer].segments[0].keys
        own = part.own.long()
        assert 0 < len(own) < TOKENS
        exact = given[layer][1].keys.transpose(0, 1).flatten(1)
        assert torch.equal(part.dense(1)[0, own], exact[own])


def test_xkv_is_exact_at_full_rank_and_its_layers_share_one_basis():
    given = layers_of(4)
    kept = XKV(layers=4, key_rank=4, value_rank=4, recent=4).compress_layers(given)
    segments = [one.segments[0] for one in kept]
    assert len({segment.keys[0].data_ptr() for segment in segments}) == 1
    for (_, exact, _), one, segment in zip(given, kept, segments, strict=True):
        assert one.recent == 4
        torch.testing.assert_close(segment.dense()[0], exact.keys[:, :16], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(segment.dense()[1], exact.values[:, :16], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_keys_are_rotated_back_by_the_model_s_own_code(family):
    model = tiny.build(family)
    rotate = rotary_of(model)
    size = getattr(model.config, "head_dim", None) or 16
    keys = torch.randn(2, 9, size)
    positions = torch.arange(9).expand(2, -1) + torch.tensor([[0], [30]])
    turned = rotate(0, keys, positions, False)
    assert not torch.allclose(turned[1], keys[1], atol=1e-2)
    torch.testing.assert_close(rotate(0, turned, positions, True), keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned[0, 0], keys[0, 0])  # position 0 is not turned


def test_keys_that_the_rotation_also_scales_are_scaled_back():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rotate = rotary_of(tiny.build("llama", rope_parameters=rope))
    keys, positions = torch.randn(2, 9, 16), torch.arange(9).expand(2, -1)
    turned = rotate(0, keys, positions, False)
    assert float(turned[0, 0].norm() / keys[0, 0].norm()) > 1.1
    torch.testing.assert_close(rotate(0, turned, positions, True), keys, rtol=1e-4, atol=1e-5)


def test_budgets_of_a_pyramid_fall_and_have_the_mean():
    budgets = [Pyramid(beta=4).budget_of(Place(layer, 9, 100, 40, PLAIN)) for layer in range(9)]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1], sum(budgets)) == (70, 10, 9 * 40)


def test_layers_of_prefixkv_hold_the_same_share_of_their_attention():
    even, peaked = torch.ones(10), torch.tensor([91.0, *[1.0] * 9])
    counts = layer_counts([even, peaked], 10)
    # The share 0.9 takes nine of ten equal tokens, and the one of the other layer.
    assert counts == [9, 1]
    assert sum(layer_counts([even, even], 7)) == 6


def test_prefixkv_keeps_its_shares_while_the_sequence_grows():
    def layers(length):
        given = []
        for layer, peak in enumerate((1.0, 500.0)):
            attention = torch.ones(HEADS, length)
            attention[:, 3] = peak
            place = Place(layer, 2, length, 8, PLAIN, shared)
            keys = torch.zeros(HEADS, length, SIZE)
            given.append(([], Recent(keys, keys, torch.arange(length, dtype=torch.int32), None, attention), place))
        return given

    shared = {}
    method = PrefixKV(sinks=0, recent=0)
    for length in (20, 30):
        kept = [one.segments[0].tokens for one in method.compress_layers(layers(length))]
        assert kept == [15, 1]
        assert all(3 in one.segments[0].positions[0] for one in method.compress_layers(layers(length))[1:])


def test_a_spectrum_of_equal_eigenvalues_has_the_entropy_one_and_a_single_one_none():
    states = torch.cat([torch.eye(8), -torch.eye(8)]).repeat(4, 1)
    torch.testing.assert_close(entropy(states, 8), torch.tensor(1.0))
    line = torch.arange(-8.5, 9)[:, None] * torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    assert float(entropy(line, 8)) < 1e-3


def test_uncomp_gives_heads_of_more_entropy_twice_the_tokens():
    keys = torch.randn(HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(9))
    keys[1] = keys[1, :, :1] * torch.ones(SIZE)
    given = recent(keys=keys, queries=torch.ones(2, HEADS, SIZE))
    kept = UNComp(sinks=1, recent=1).compress([], given, Place(0, 1, TOKENS, 9, PLAIN))
    segment = kept.segments[0]
    assert [len(part) for part in segment.keys] == [12, 6]
    assert kept.memory.tolist() == [True, False]


def test_attention_over_ragged_heads_is_that_of_each_head():
    given = recent()
    parts = [slice(0, 7), slice(2, 15)]
    keys, values = (
        [getattr(given, name)[head, part] for head, part in enumerate(parts)] for name in ("keys", "values")
    )
    positions = [given.positions[part] for part in parts]
    queries = torch.randn(3, HEADS * 2, SIZE, generator=torch.Generator().manual_seed(10))
    at = torch.arange(20, 23)
    whole = Ragged(keys, values, positions).attend(queries, at, PLAIN)
    for head in range(HEADS):
        alone = Dense(keys[head][None], values[head][None], positions[head][None])
        own = alone.attend(queries[:, 2 * head : 2 * head + 2], at, PLAIN)
        torch.testing.assert_close(whole.o[:, 2 * head : 2 * head + 2], own.o)


def test_mikv_holds_the_tokens_with_much_attention_in_more_bits():
    attention = torch.zeros(HEADS, TOKENS)
    attention[0, [3, 8]], attention[1, [5, 6]] = 1.0, 1.0
    given = recent(attention=attention, queries=torch.ones(4, HEADS, SIZE))
    method = MiKV(share=2 / 16, recent=4, window=4)
    kept = method.compress([], given, PLACE)
    (segment,) = kept.segments
    assert segment.positions[:, :2].tolist() == [[3, 8], [5, 6]]
    keys, _, positions = segment.dense()
    errors = (keys - given.keys.gather(1, positions.long()[..., None].expand_as(keys))).abs().amax(-1)
    assert errors[:, :2].max() < 0.1 * errors[:, 2:].mean()
    assert torch.equal(kept.kept[:, -4:], torch.arange(16, 20).expand(HEADS, -1))


def test_a_token_in_few_bits_never_returns_to_more():
    attention = torch.zeros(HEADS, TOKENS)
    attention[:, :4] = 1.0
    given = recent(attention=attention, queries=torch.ones(4, HEADS, SIZE))
    method = MiKV(share=0.25, recent=4, window=4)
    first = method.compress([], given, PLACE).segments
    low = first[0].positions[0, 10]
    held = torch.zeros(HEADS, 16 + TOKENS)
    held[:, 10] = 9.0  # this token, which now receives most
    later = recent(attention=held, queries=given.queries, positions=torch.arange(100, 100 + TOKENS, dtype=torch.int32))
    second = method.compress(first, later, PLACE).segments[0]
    assert second.high_tokens == round(0.25 * 32)
    assert low not in second.positions[0, : second.high_tokens]


def test_zipvl_takes_as_many_tokens_as_make_up_the_share_of_attention():
    attention = torch.tensor([[5.0, 1.0, 3.0, 1.0]])
    assert ZipVL(attention=0.5).number(attention) == 1
    assert ZipVL(attention=0.8).number(attention) == 2
    assert ZipVL(attention=1.0).number(attention) == 4


def test_rotatekv_spreads_an_outlier_channel_over_the_grid():
    given = recent(
        keys=torch.randn(HEADS, 40, 32, generator=torch.Generator().manual_seed(11)),
        values=torch.randn(HEADS, 40, 32, generator=torch.Generator().manual_seed(12)),
        positions=torch.arange(40, dtype=torch.int32),
    )
    given.values[:, :, 5] *= 20
    place = Place(0, 1, 40, None, PLAIN, {}, lambda keys, positions, inverse: keys)
    segment = RotateKV(bits=3, sinks=4, residual=4, block=32, group=32).compress([], given, place).segments[1]
    plain = quantize_pack(given.values[:, 4:36].flatten(0, 1), 3, "token", 32)
    others = [channel for channel in range(32) if channel != 5]
    exact = given.values[:, 4:36]
    rotated = (segment.dense()[1] - exact)[..., others].square().mean()
    unrotated = (unpack_dequantize(plain).unflatten(0, (HEADS, -1)) - exact)[..., others].square().mean()
    assert rotated < 0.5 * unrotated


def test_rotatekv_at_8_bits_gives_the_keys_back_for_their_positions():
    model = tiny.build("llama")
    rotate = rotary_of(model)
    keys = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(13))
    positions = torch.arange(40, dtype=torch.int32)
    turned = rotate(0, keys, positions.expand(2, -1), False)
    place = Place(0, 1, 40, None, PLAIN, {}, lambda *given: rotate(0, *given))
    kept = RotateKV(bits=8, sinks=4, residual=4).compress([], Recent(turned, keys, positions), place)
    assert [segment.tokens for segment in kept.segments] == [4, 32]
    torch.testing.assert_close(kept.segments[1].dense()[0], turned[:, 4:36], rtol=0, atol=0.05)


def test_centroids_are_the_means_of_what_is_nearest_to_them():
    numbers = torch.cat([torch.full((25,), value) + torch.linspace(-0.01, 0.01, 25) for value in (-1.0, 0.1, 0.8, 1.0)])
    centroids = centroids_of(numbers, 2)
    torch.testing.assert_close(centroids, torch.tensor([-1.0, 0.1, 0.8, 1.0]))
    uniform = centroids_of(torch.linspace(-1, 1, 4001), 3)
    torch.testing.assert_close(uniform, torch.arange(-7, 8, 2) / 8, rtol=0, atol=0.02)


def test_kvquant_keeps_outliers_exact_and_codes_the_rest_by_channel():
    keys = torch.randn(HEADS, 68, SIZE, generator=torch.Generator().manual_seed(14))
    keys[:, :, 2] *= 50  # a channel with a range of its own
    keys[0, 20, 4] = 30.0  # an outlier
    positions = torch.arange(68, dtype=torch.int32)
    place = Place(0, 1, 68, None, PLAIN, {}, lambda keys, positions, inverse: keys)
    method = KVQuant(bits=4, outliers=0.05, residual=4, sinks=0)
    segment = method.compress([], Recent(keys, keys.clone(), positions), place).segments[0]
    found = segment.dense()[0]
    assert found[0, 20, 4] == 30.0
    errors = (found - keys[:, :64]).abs().mean((0, 1))
    others = [channel for channel in range(SIZE) if channel != 2]
    assert errors[others].max() < 0.1
    # Later tokens are coded by the same ranges.
    later = method.compress([segment], Recent(keys, keys.clone(), positions), place).segments[1]
    assert later.keys.scale is segment.keys.scale
    assert later.keys.centroids is segment.keys.centroids


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_is_of_the_tokens_of_the_sequence(share):
    assert CacheBudget(share).tokens(201) == math.ceil(201 * share)
    assert CacheBudget(64).tokens(201) == 64


@pytest.mark.parametrize("method", [SnapKV(window=8), StreamingLLM(), H2O()], ids=lambda method: type(method).__name__)
def test_a_budget_of_bytes_bounds_what_all_layers_hold(method):
    model = tiny.build("llama", max_position_embeddings=1024)
    attach(model)
    tokens = torch.randint(3, tiny.VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(3))
    for budget in (20_000, 40_000):
        cache = CompressedCache(model, method, CacheBudget(budget, in_bytes=True))
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        # A token more in each layer would be too much: two heads of 16 numbers, twice, and their positions and sums.
        assert budget - 2 * 2 * (2 * 16 * 4 + 4 + 4) < cache.nbytes <= budget
    with pytest.raises(UserError, match=r"cache_budget_bytes=100 is too small: .* takes \d+ bytes"):
        CompressedCache(model, method, CacheBudget(100, in_bytes=True))


def test_a_method_that_holds_everything_has_no_budget_of_bytes():
    with pytest.raises(UserError, match="cache=LoopServe holds all tokens, so cache_budget_bytes=9000 cannot be kept"):
        CompressedCache(tiny.build("llama"), LoopServe(), CacheBudget(9000, in_bytes=True))


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (lambda: CacheBudget(0), "cache_budget=0 is wrong"),
        (lambda: CacheBudget(1.5), "cache_budget=1.5 is wrong"),
        (lambda: CacheBudget(0.5, in_bytes=True), "cache_budget_bytes=0 is wrong: a whole number of bytes"),
        (lambda: SnapKV(kernel=4), "cache.kernel=4"),
        (lambda: SnapKV(pooling="sum"), "cache.pooling=sum is none of average, max"),
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
        cache = CompressedCache(model, method, budget)
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
