"""The contract of every searcher in conf/allocator."""

import itertools
import json
import zlib
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.allocators.base import DROP, Allocator, size
from hasten.accel.compression.search.base import Problem, Searcher, State
from hasten.accel.compression.search.samples import Sample
from hasten.accel.errors import UserError
from tests.compression.search.problems import Additive, PerToken, droppable, equal, problem, search, unequal

ALL = sorted((Path(__file__).parents[3] / "conf" / "allocator").glob("*.yaml"))
CONFIGS = [path for path in ALL if issubclass(get_class(OmegaConf.load(path)["_target_"]), Searcher)]
STEPS = 3
LENGTHS = [64] * 80


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def searcher(request):
    return instantiate(OmegaConf.load(request.param)).with_steps(STEPS)


def half(units):
    """A budget in the middle between the smallest and the largest size."""
    return (size(units, [0] * len(units)) + size(units, [len(unit.choices) - 1 for unit in units])) // 2


def steps_of(searcher, units, fitness, seed=0, state=None, start=None):
    """Every step of a search of half the bits."""
    asked = Problem(units, half(units), LENGTHS, seed, start)
    return list(searcher.search(asked, lambda lots: [fitness(genomes, sample) for genomes, sample in lots], state))


def test_every_other_config_is_an_allocator_in_closed_form():
    others = [get_class(OmegaConf.load(path)["_target_"]) for path in ALL if path not in CONFIGS]
    assert all(issubclass(each, Allocator) and not issubclass(each, Searcher) for each in others)


@pytest.mark.parametrize("seed", range(20))
def test_no_candidate_is_over_the_budget_or_measured_twice_at_once(searcher, seed):
    units, budget = problem(seed)
    fitness = Additive(units, seed)
    answer = search(searcher, units, budget, fitness, LENGTHS, seed)
    assert size(units, answer.incumbent) <= budget
    for genomes, _, _ in fitness.calls:
        assert len(set(genomes)) == len(genomes)
        for genome in genomes:
            assert size(units, genome) <= budget
            dropped = {u.name for u, g in zip(units, genome, strict=True) if u.choices[g].level == DROP}
            assert all(g == 0 for u, g in zip(units, genome, strict=True) if u.part_of in dropped)


@pytest.mark.parametrize("units", [equal(12), unequal(), droppable()], ids=["equal", "unequal", "drops"])
def test_equal_seeds_give_equal_searches_and_other_seeds_others(searcher, units):
    runs = []
    for seed in (3, 3, 4):
        fitness = Additive(units, 0)
        runs.append((steps_of(searcher, units, fitness, seed), fitness.calls))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize("units", [unequal(), droppable()], ids=["levels", "drops"])
def test_a_search_goes_on_from_the_saved_state_of_any_step_as_if_it_never_stopped(searcher, units):
    whole = steps_of(searcher, units, Additive(units, 0))
    assert [state.step for state, _ in whole] == list(range(STEPS + 1))
    for number, (state, _) in enumerate(whole):
        saved = State.from_json(json.loads(json.dumps(state.to_json())))
        assert saved == state
        assert steps_of(searcher, units, Additive(units, 0), state=saved) == whole[number + 1 :]


def test_a_search_of_more_steps_goes_on_from_one_of_fewer(searcher):
    units = unequal()
    fewer, more = searcher.with_steps(2), searcher.with_steps(4)
    assert (fewer.steps, more.steps) == (2, 4)
    assert fewer.fingerprint() == more.fingerprint()
    first = steps_of(fewer, units, Additive(units, 0))
    rest = steps_of(more, units, Additive(units, 0), state=first[-1].state)
    assert first + rest == steps_of(more, units, Additive(units, 0))


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_is_never_worse_than_the_start_on_all_tokens(searcher, seed):
    units, start = equal(), (1, 1, 1, 1, 1, 1)
    everything = sum(LENGTHS)

    def noisy(genomes, sample):
        # On a few tokens chance decides, and on all of them most genomes are worse than the start.
        if sample.tokens < everything:
            return [zlib.crc32(repr((genome, sample, seed)).encode()) / 2**32 for genome in genomes]
        return [sum(abs(g - 1) for g in genome) * (-1) ** (sum(genome[:3]) % 5 == seed) for genome in genomes]

    answer = search(searcher, units, 180, noisy, LENGTHS, seed, start=start)
    before, after = noisy([start, answer.incumbent], Sample(tuple(enumerate(LENGTHS))))
    assert after <= before


def test_the_start_is_the_answer_where_every_candidate_is_worse(searcher):
    units, start = equal(), (2, 0, 2, 0, 2, 0)
    steps = steps_of(searcher, units, lambda gs, _: [float(g != start) for g in gs], start=start)
    assert {state.incumbent for state, _ in steps} == {start}


def test_counters_match_the_requests_and_stay_within_the_plan(searcher):
    units = equal(12)
    fitness = PerToken(LENGTHS)
    steps = steps_of(searcher, units, fitness)
    asked = sum(len(genomes) * sample.tokens for genomes, sample in fitness.calls)
    assert sum(stats.tokens for _, stats in steps) == steps[-1].state.tokens == asked
    assert sum(stats.evaluated for _, stats in steps) == steps[-1].state.evaluated
    assert 0 < asked <= searcher.measured_tokens(sum(LENGTHS))
    for (before, _), (after, stats) in itertools.pairwise(steps):
        assert stats.changed == sum(a != b for a, b in zip(before.incumbent, after.incumbent, strict=True))


def test_a_search_finds_better_levels_than_it_begins_with(searcher):
    units = equal(12)
    fitness = Additive(units, 1)
    steps = steps_of(searcher.with_steps(20), units, fitness)
    assert fitness.exact(steps[-1].state.incumbent) < fitness.exact(steps[0].state.incumbent)


def test_a_problem_with_one_genome_ends(searcher):
    (only,) = equal(1)
    steps = steps_of(searcher, [only], Additive([only], 0))
    assert steps[-1].state.step == STEPS
    assert steps[-1].state.incumbent == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [1] * 100}, "calibration"),
        ({"seed": -1}, "seed=-1"),
        ({"budget": 100}, "below the lowest level"),
        ({"budget": 300}, "above the highest level"),
        ({"start": (2, 2, 2, 2, 2, 2)}, "start costs 240: the budget is 180"),
        ({"start": (1, 1)}, "start holds 2 choices that are not those of these 6 units"),
        ({"state": State(1, (0, 0, 0, 0, 0, 3), 0.0, 0, 0)}, "state holds 6 choices that are not those"),
    ],
)
def test_wrong_searches_are_refused_before_anything_is_measured(searcher, arguments, message):
    def refuse(genomes, sample):
        raise AssertionError("measured")

    given = {"budget": 180, "lengths": LENGTHS, "seed": 0, **arguments}
    with pytest.raises(UserError, match=message) as raised:
        search(searcher, equal(), fitness=refuse, **given)
    assert "\n" not in str(raised.value)
