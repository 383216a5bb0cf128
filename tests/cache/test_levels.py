"""Levels of a cache: their bytes and divergences, and what a search does with them, on the trained target."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.accel.cache.base import CacheBudget, CacheLevel
from hasten.accel.cache.calibration import gather
from hasten.accel.cache.evict.snapkv import SnapKV
from hasten.accel.cache.full import Full
from hasten.accel.cache.levels import (
    CacheBytes,
    LevelResult,
    MixMeasurement,
    MixResult,
    alone,
    cache_units,
    check_levels,
    level_result,
    quality,
    uniform_divergence,
)
from hasten.accel.cache.measure import CacheMeasurement, FullPredictions
from hasten.accel.cache.mixed import Mixed
from hasten.accel.cache.quantize.kivi import KIVI
from hasten.accel.cache.quantize.kvquant import KVQuant
from hasten.accel.cache.retrieve.loop_serve import LoopServe
from hasten.accel.cache.statistics import Statistics, file_name, of_mixture
from hasten.accel.compression.allocators.exact import Exact
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint, resolve

CONTEXT = 96
LEVELS = {"full": CacheLevel(Full()), "two": CacheLevel(KIVI(bits=2, residual=0))}


@pytest.fixture(scope="module")
def measurement():
    folder = resolve("embedded:target")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = open(torch.overrides.__file__).read()  # noqa: SIM115
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids[: 2 * (CONTEXT + 36)])
    return MixMeasurement(model, tokens.view(2, -1), CONTEXT)


def test_a_mixture_is_measured_in_pieces_as_token_by_token(measurement):
    mix = (CacheLevel(Full()), LEVELS["two"], CacheLevel(SnapKV(window=8), CacheBudget(0.25)), LEVELS["two"])
    found = measurement.measure(mix, 1)
    tokenwise = CacheMeasurement(measurement.model, Mixed(mix), None)
    sums = tokenwise.text(FullPredictions(measurement.model, measurement.windows[1:], CONTEXT))
    assert len(found.divergences) == sums.tokens == 36
    # float32, in another order
    assert sum(found.divergences) == pytest.approx(sums.divergence, rel=1e-3)
    assert sum(found.losses) == pytest.approx(sums.loss, rel=1e-4)
    assert found.agreed == sums.agreed
    assert sum(found.held) == tokenwise.bytes_at[0]


def test_levels_with_statistics_are_measured_with_them(measurement):
    method, windows = KVQuant(bits=2, outliers=0.0, residual=0), measurement.windows
    mix = (CacheLevel(method), CacheLevel(Full()), CacheLevel(method), CacheLevel(Full()))
    sums = gather(Architecture(Checkpoint(resolve("embedded:target"))), [method], windows[:1], 1, 1)
    own = {file_name(method): Statistics(method.solve(sums[0]), {})}
    with_statistics = MixMeasurement(measurement.model, windows, CONTEXT, own)
    found = with_statistics.measure(mix, 1)
    expected = CacheMeasurement(measurement.model, Mixed(mix), None, of_mixture(Mixed(mix), own))
    assert sum(found.divergences) == pytest.approx(
        expected.text(FullPredictions(measurement.model, windows[1:], CONTEXT)).divergence, rel=1e-3
    )
    assert sum(found.divergences) != pytest.approx(sum(measurement.measure(mix, 1).divergences), rel=1e-2)


def test_the_optimum_of_single_levels_has_less_divergence_than_the_same_bytes_elsewhere(measurement):
    """Of four layers two may be full: those whose two bits cost most."""
    count = measurement.layers
    full = measurement.measure((LEVELS["full"],) * count, 0)
    assert sum(full.divergences) == pytest.approx(0, abs=1e-6)
    results = {
        (layer, name): level_result(layer, [measurement.measure(alone(layer, level, count), 0)])
        for layer in range(count)
        for name, level in LEVELS.items()
    }
    units = cache_units(results, count, CONTEXT)
    assert [choice.level for choice in units[0].choices] == ["two", "full"]
    low, high = (choice.cost for choice in units[0].choices)
    assert count * high == sum(full.held)
    chosen = Exact().choose(units, 2 * low + 2 * high)
    assert sum(chosen) == 2

    def divergence(choices):
        mix = tuple(LEVELS[unit.choices[choice].level] for unit, choice in zip(units, choices, strict=True))
        return sum(measurement.measure(mix, 1).divergences)  # of a text that was not measured

    assert divergence(chosen) < 0.5 * divergence([1 - choice for choice in chosen])


def test_bytes_and_errors_are_those_of_the_layer_over_all_texts():
    results = [MixResult((0.1, 0.3), (1.0, 1.0), 1, (7, 100)), MixResult((0.2, 0.2), (2.0, 2.0), 2, (7, 104))]
    assert level_result(1, results) == LevelResult(104, pytest.approx(0.2))
    means = quality(results, 10)
    assert means["kl_divergence"] == pytest.approx(0.2)
    assert means["perplexity"] == pytest.approx(torch.tensor(1.5).exp().item())
    assert means["top1_agreement"] == 0.75
    assert means["cache_bytes_per_token"] == 11.1


def test_a_budget_is_bytes_a_token_or_a_share_of_the_full_cache():
    unit = CacheBytes(tokens=10, full=4000)
    assert unit.limit(0.25, []) == 1000
    assert unit.limit(100, []) == 1000
    assert unit.amount(1000, []) == 100


def test_uniform_levels_are_compared_on_the_line_between_the_best_of_them():
    # The level at 20 is worse than a mixture of those at 10 and 30 would be.
    points = [(30.0, 0.0), (10.0, 1.0), (20.0, 0.9)]
    assert uniform_divergence(points, 20.0) == pytest.approx(0.5)
    assert uniform_divergence(points, 5.0) == 1.0
    assert uniform_divergence(points, 40.0) == 0.0


def test_a_level_that_saves_no_bytes_is_refused():
    check_levels(LEVELS)
    with pytest.raises(UserError, match="level loop holds all tokens"):
        check_levels({"loop": CacheLevel(LoopServe(), CacheBudget(0.5))})
