"""Caches whose layers have methods of their own, and their files."""

import json

import pytest
import torch

from hasten.accel.cache.attention import attach
from hasten.accel.cache.base import CacheBudget, CacheLevel
from hasten.accel.cache.cache import CompressedCache
from hasten.accel.cache.evict.h2o import H2O
from hasten.accel.cache.evict.snapkv import SnapKV
from hasten.accel.cache.full import Full
from hasten.accel.cache.mixed import Mixed, read, write
from hasten.accel.cache.quantize.fp8 import FP8
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.cache.retrieve.loop_serve import LoopServe
from hasten.accel.cache.retrieve.tidal_decode import TidalDecode
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.packed import PackedSegment
from hasten.accel.cache.share.minicache import MiniCache
from hasten.accel.decoding.targets.cached import CachedTarget
from hasten.accel.errors import UserError
from tests.models import tiny

PROMPT = torch.randint(3, tiny.VOCABULARY, (1, 90), generator=torch.Generator().manual_seed(3))
QUARTER = CacheLevel(SnapKV(window=8), CacheBudget(0.25))


@pytest.fixture(scope="module")
def model():
    made = tiny.build("llama", num_hidden_layers=3, max_position_embeddings=1024)
    attach(made)
    return made


def held(model, method, budget=None, new=0):
    """Sequences of all layers after the prompt, and so many tokens behind it."""
    cache = CompressedCache(model, method, budget)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        for token in range(new):
            model(PROMPT[:, token : token + 1], past_key_values=cache)
    return [layer.sequences[0] for layer in cache.compressed]


def test_each_layer_keeps_what_its_own_method_keeps(model):
    mixed = Mixed((CacheLevel(Full()), CacheLevel(KIVI(bits=4, residual=8)), QUARTER))
    full, packed, evicted = held(model, mixed)
    assert full.segments == []
    assert full.tokens == 90
    assert [type(segment) for segment in packed.segments] == [PackedSegment]
    assert packed.tokens == 90
    assert [type(segment) for segment in evicted.segments] == [Dense]
    assert evicted.tokens == 23
    # A layer remembers only what its own method reads: SnapKV the queries since the prompt.
    full, _, evicted = held(model, mixed, new=2)
    assert full._queries is None
    assert len(evicted._queries) == 2


def test_the_first_layer_full_and_four_bits_elsewhere_is_the_default(model):
    sequences = held(model, Mixed())
    assert [len(sequence.segments) for sequence in sequences] == [0, 1, 1]


def test_a_mixture_of_one_method_is_that_method(model):
    alone, mixed = (
        held(model, method, budget, new=40)
        for method, budget in ((QUARTER.method, QUARTER.budget), (Mixed((QUARTER,)), None))
    )
    for one, other in zip(alone, mixed, strict=True):
        assert torch.equal(one.segments[0].dense()[0], other.segments[0].dense()[0])
        assert one.nbytes == other.nbytes


def test_methods_are_applied_at_their_own_intervals(model):
    every = CacheLevel(LoopServe(every=8), CacheBudget(40))
    method = Mixed((every, CacheLevel(H2O(), CacheBudget(40)), CacheLevel(Full())))
    assert method.interval == 8
    # H2O, which is applied after 32 tokens, holds 24 more.
    assert held(model, method, new=24)[1].tokens == 64
    assert held(model, method, new=32)[1].tokens == 40
    target = CachedTarget(model, method)
    target.reserve(1, 200)
    target.prefill(0, PROMPT[0].tolist())
    target.end_prompt(0)
    assert target.room(0) == 8
    assert [layer.sequences[0].tokens for layer in target._compressed.compressed] == [90, 40, 90]


def test_an_assignment_is_read_as_it_was_written(tmp_path, model):
    levels = {"full": CacheLevel(Full()), "kivi:bits=2": CacheLevel(KIVI(bits=2)), "snapkv:budget=0.25": QUARTER}
    names = ["full", "snapkv:budget=0.25", "kivi:bits=2"]
    write(tmp_path / "a.json", levels, names)
    assert read(tmp_path / "a.json") == [levels[name] for name in names]
    assert Mixed(assignment=str(tmp_path / "a.json")).layers == tuple(levels[name] for name in names)
    (tmp_path / "a.yaml").write_text(
        "levels:\n  a: {_target_: hasten.accel.cache.full.Full}\n  b: {_target_: hasten.accel.cache.quantize.fp8.FP8}\n"
        "layers: [a, b]\n"
    )
    short = Mixed(assignment=str(tmp_path / "a.yaml"))
    assert short.layers == (CacheLevel(Full()), CacheLevel(FP8()))
    with pytest.raises(UserError, match="has 2 layers, the model 3"):
        CompressedCache(model, short)
    with pytest.raises(UserError, match=r"cache\.layers has 4 layers, the model 3"):
        CompressedCache(model, Mixed((CacheLevel(Full()),) * 4))


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("[", "cannot be read"),
        ("{}", "expected levels"),
        ({"levels": {"a": {"_target_": "torch.nn.Linear"}}, "layers": ["a"]}, "torch.nn.Linear is no cache method"),
        ({"levels": {"a": {"_target_": "no.such.Thing"}}, "layers": ["a"]}, "no.such.Thing is no cache method"),
        ({"levels": {"a": {"_target_": "hasten.accel.cache.full.Full"}}, "layers": ["b"]}, "KeyError: 'b'"),
        ({"levels": {"a": {"_target_": "hasten.accel.cache.full.Full", "x": 1}}, "layers": ["a"]}, "'x'"),
    ],
)
def test_a_wrong_assignment_is_named(tmp_path, content, wrong):
    file = tmp_path / "a.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=rf"cache.assignment=.*a\.json.*{wrong}"):
        read(file)


@pytest.mark.parametrize(
    ("level", "wrong"),
    [
        (CacheLevel(MiniCache()), "cache=MiniCache needs several layers"),
        (CacheLevel(TidalDecode(), CacheBudget(0.5)), "cache=TidalDecode needs several layers"),
        (CacheLevel(Mixed()), "cache=Mixed needs several layers"),
        (CacheLevel(SnapKV()), "cache=SnapKV keeps a budget"),
        (CacheLevel(Full(), CacheBudget(0.5)), "cache=Full has no budget"),
    ],
)
def test_what_cannot_be_one_layers_method_is_refused(level, wrong):
    with pytest.raises(UserError, match=wrong):
        Mixed((level,))
