"""Costs of measuring caches, for various options and against what is held."""

from dataclasses import replace

from hasten.accel.cache.base import CacheLevel
from hasten.accel.cache.evict.snapkv import SnapKV
from hasten.accel.cache.full import Full
from hasten.accel.cache.levels import MixMeasurement
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.costs import caches
from hasten.accel.costs.caches import CacheWork, MixWork, Texts
from tests.costs.rates import RATES
from tests.models import tiny

TEXT = Texts(2, 32, 16)


def seconds(estimate):
    return {step.name: step.cpu_seconds for step in estimate.steps}


def test_rows_share_the_workers_and_each_loads_the_model(model):
    one = CacheWork(model, 6, TEXT, recalled=5, context=32, asked=8, workers=3)
    found, twice = caches.estimate(one, RATES), caches.estimate(replace(one, rows=12), RATES)
    for name, value in seconds(found).items():
        assert seconds(twice)[name] == 2 * value > 0
    assert {step.seconds * 3 == step.cpu_seconds for step in found.steps} == {True}
    assert set(seconds(caches.estimate(replace(one, text=None), RATES))) == {"recall", "load models"}
    assert caches.estimate(replace(one, rows=2), RATES).processes[0].count == 2


def test_prompts_are_planned_as_they_are_kept(folder, model):
    work = MixWork(model, 3, (Full(), KIVI(), SnapKV()), TEXT, 0, 5, Texts(1, 32, 16))
    held = caches.mixtures(work, RATES).processes[0].host["measure"]
    windows = tiny.tokens(2, 48)
    measurement = MixMeasurement(tiny.build("llama"), windows, 32)
    for number in range(2):
        for method in work.methods:
            measurement._prompt(method, number)
        measurement.measure((CacheLevel(Full()),) * measurement.layers, number)
    prompts = [sequence for prompt in measurement._prompts.values() for sequence in prompt.sequences]
    keys = sum(part.nbytes for one in prompts for part in (one._keys[:, :32], one._values[:, :32]))
    assert held["prompts"] == keys
    assert held["predictions of the full cache"] == sum(part.nbytes for part, _ in measurement._full.values())


def test_a_search_takes_longer_the_more_it_measures(model):
    work = MixWork(model, 3, (Full(), KIVI()), TEXT, 320, 5, TEXT)
    found = seconds(caches.mixtures(work, RATES))
    assert seconds(caches.mixtures(replace(work, scored=640), RATES))["search"] == 2 * found["search"]
    assert seconds(caches.mixtures(replace(work, levels=6), RATES))["levels"] == 2 * found["levels"]
    assert "search" not in seconds(caches.mixtures(replace(work, scored=0), RATES))
