import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.compression.allocators.base import DROP, size
from hasten.accel.compression.search.base import State
from hasten.accel.compression.search.evopress import EvoPress
from hasten.accel.compression.search.samples import Sample, draw_nested
from hasten.accel.errors import UserError
from tests.compression.search.problems import (
    LENGTHS,
    SMALL,
    Additive,
    PerToken,
    droppable,
    equal,
    part,
    problem,
    search,
    unequal,
    unit,
)

CONFIG = Path(__file__).parents[3] / "conf" / "allocator" / "evopress.yaml"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [2.5, 3.0])
@pytest.mark.parametrize("units", [equal(), unequal()], ids=["equal", "unequal"])
def test_it_finds_the_optimum_that_brute_force_finds(units, budget, seed):
    budget = int(budget * sum(u.weights for u in units))
    fitness = Additive(units, seed)
    state = search(replace(SMALL, generations=40, offspring=16), units, budget, fitness, LENGTHS, seed)
    assert fitness.exact(state.incumbent) == fitness.optimum(budget)


@pytest.mark.parametrize("seed", range(10))
def test_it_drops_the_parts_that_brute_force_drops(seed):
    units = []
    for i in range(6):
        units += [part(f"p{i}"), unit(f"u{i}", 10, (16,), part_of=f"p{i}")]
    fitness = Additive(units, seed)
    state = search(replace(SMALL, generations=10), units, 4 * 160, fitness, LENGTHS, seed)
    assert fitness.exact(state.incumbent) == fitness.optimum(4 * 160)


@pytest.mark.parametrize("seed", range(10))
def test_levels_and_drops_under_one_budget_reach_the_optimum(seed):
    units = droppable()
    fitness = Additive(units, seed)
    state = search(replace(SMALL, generations=30, offspring=16, foresight=1), units, 225, fitness, LENGTHS, seed)
    assert fitness.exact(state.incumbent) == fitness.optimum(225)


@pytest.mark.parametrize("seed", range(5))
def test_of_several_variants_those_of_the_least_errors_are_measured(seed):
    units = equal(12)
    fitness = Additive(units, seed)
    known = [
        replace(u, choices=tuple(replace(choice, error=cost) for choice, cost in zip(u.choices, costs, strict=True)))
        for u, costs in zip(units, fitness.costs, strict=True)
    ]
    means = {}
    for foresight in (1, 8):
        fitness.calls.clear()
        search(replace(SMALL, generations=1, foresight=foresight), known, 300, fitness, LENGTHS, seed)
        offspring, _, _ = fitness.calls[1]
        means[foresight] = sum(map(fitness.exact, offspring)) / len(offspring)
    assert means[8] < means[1]


@pytest.mark.parametrize("seed", range(80))
def test_no_candidate_is_over_the_budget_or_evaluated_twice_at_once(seed):
    units, budget = problem(seed)
    fitness = Additive(units, seed)
    method = replace(SMALL, grouped=seed % 3 > 0, across=0.5 * (seed % 2))
    state = search(method, units, budget, fitness, LENGTHS, seed)
    assert state.step == 6
    for genomes, _, _ in fitness.calls:
        assert len(set(genomes)) == len(genomes)
        for genome in genomes:
            assert size(units, genome) <= budget
            dropped = {u.name for u, g in zip(units, genome, strict=True) if u.choices[g].level == DROP}
            assert all(g == 0 for u, g in zip(units, genome, strict=True) if u.part_of in dropped)


def test_a_seed_repeats_its_result_and_another_seed_takes_another_path():
    units = unequal()
    runs = []
    for seed in (3, 3, 4):
        fitness = Additive(units, 0)
        runs.append((search(SMALL, units, 400, fitness, LENGTHS, seed), fitness.calls))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize("units", [unequal(), droppable()], ids=["levels", "drops"])
def test_a_search_goes_on_after_any_generation_as_if_it_never_stopped(units):
    budget = int(2.5 * sum(u.weights for u in units))
    whole = Additive(units, 0)
    states, calls = [], []

    def after(state, _):
        states.append(state)
        calls.append(len(whole.calls))

    final = search(SMALL, units, budget, whole, LENGTHS, 1, after=after)
    assert [state.step for state in states] == list(range(7))
    assert len(set(calls)) == 7
    for state, made in zip(states, calls, strict=True):
        rest = Additive(units, 0)
        known = State.from_json(json.loads(json.dumps(state.to_json())))
        assert known == state
        assert search(SMALL, units, budget, rest, LENGTHS, 1, state=known) == final
        assert rest.calls == whole.calls[made:]


def test_the_parent_is_measured_anew_in_the_last_step_and_stays_unless_an_offspring_is_better():
    fitness = PerToken(LENGTHS)
    kept = 0
    for old, new, info, calls in generations(replace(SMALL, generations=30), fitness):
        measured = [(genomes, sample) for genomes, sample in calls if old.incumbent in genomes]
        assert max(len(genomes) for genomes, _ in measured) == 2 + 1  # 8 and 4 are compared before
        assert sum(sample.tokens for _, sample in measured) == 90
        parts = [part for _, sample in measured for part in sample.parts]
        # Sums of 90 numbers, added in another order.
        assert info.previous_fitness == pytest.approx(fitness.mean(old.incumbent, parts), rel=1e-12)
        assert new.fitness == pytest.approx(fitness.mean(new.incumbent, parts), rel=1e-12)
        assert new.fitness < info.previous_fitness or new.incumbent == old.incumbent
        assert info.changed == sum(a != b for a, b in zip(old.incumbent, new.incumbent, strict=True))
        kept += new.incumbent == old.incumbent
    assert 0 < kept < 30


def test_an_offspring_that_is_only_as_good_does_not_replace_the_parent():
    states = []
    third = [1 / 3] * 100
    search(SMALL, equal(), 180, lambda gs, _: third[: len(gs)], LENGTHS, 0, after=lambda *pair: states.append(pair))
    assert {state.incumbent for state, _ in states} == {(1, 1, 1, 1, 1, 1)}
    assert states[-1][0].evaluated > 50


def test_candidates_that_cannot_be_measured_never_win():
    units = equal()
    start = (1, 1, 1, 1, 1, 1)
    state = search(SMALL, units, 180, lambda gs, _: [1.0 if g == start else math.nan for g in gs], LENGTHS, 0)
    assert state.incumbent == start
    broken = search(SMALL, units, 180, lambda gs, _: [math.nan] * len(gs), LENGTHS, 0)
    assert broken.to_json()["fitness"] is None
    assert State.from_json(broken.to_json()).fitness == math.inf


def generations(method, fitness, units=()):
    """Old state, new state, info and calls of every generation of a search."""
    units = units or equal(12)
    states = []
    search(
        method,
        units,
        sum(3 * u.weights for u in units),
        fitness,
        fitness.lengths,
        0,
        after=lambda state, info: states.append((state, info, len(fitness.calls))),
    )
    for (old, _, begin), (new, info, end) in itertools.pairwise(states):
        yield old, new, info, fitness.calls[begin:end]


def asked_of(calls):
    """Parts of the samples on which each genome was measured, in the order of the calls."""
    found = {}
    for genomes, sample in calls:
        for genome in genomes:
            found.setdefault(genome, []).extend(sample.parts)
    return found


def test_a_survivor_is_measured_on_the_new_tokens_of_each_step_and_the_parent_on_all():
    fitness = PerToken([10] * 20)
    total = 30
    for old, new, info, calls in generations(SMALL, fitness):
        steps = [(len(genomes), sample.tokens) for genomes, sample in calls]
        assert steps == [(8, 20), (4, 30), (1, 20), (1, 30), (3, 40)]
        assert calls[2][0] == calls[3][0] == [old.incumbent]
        for parts in asked_of(calls).values():
            assert len({number for number, _ in parts}) == len(parts)
        assert info.tokens == 8 * 20 + 4 * 30 + 3 * 40 + 50
        assert info.evaluated == 8 + 4 + 3
        total += info.tokens
        assert (new.tokens, new.evaluated) == (total, 1 + 15 * new.step)


def test_only_the_sequence_that_a_step_cut_runs_again():
    fitness = PerToken(LENGTHS)
    again = 0
    for _, _, info, calls in generations(SMALL, fitness):
        assert info.tokens == sum(len(genomes) * sample.tokens for genomes, sample in calls)
        for parts in asked_of(calls).values():
            for index, (number, used) in enumerate(parts):
                before = [other for earlier, other in parts[:index] if earlier == number]
                assert all(other < used for other in before)
                again += bool(before)
    assert again > 0


def test_steps_of_as_many_tokens_measure_nothing_again():
    method = replace(SMALL, survivors=(4, 2, 1), tokens=(31, 31, 31))
    for old, _, info, calls in generations(method, PerToken(LENGTHS)):
        assert info.tokens == (8 + 1) * 31
        assert all(genomes == [old.incumbent] or len(genomes) == 8 for genomes, _ in calls)


@pytest.mark.parametrize("lengths", [[10] * 20, LENGTHS], ids=["whole", "cut"])
def test_each_step_keeps_the_best_on_its_whole_sample_which_contains_the_step_before(lengths):
    fitness = PerToken(lengths)
    for old, new, _, calls in generations(SMALL, fitness):
        left = calls[0][0]
        # Number of tokens of each sequence that were used last.
        used = {genome: dict(parts) for genome, parts in asked_of(calls).items()}
        samples = [next(each for each in used.values() if sum(each.values()) == tokens) for tokens in (20, 50, 90)]
        assert {sum(each.values()) for each in used.values()} == {20, 50, 90}
        for smaller, larger in itertools.pairwise(samples):
            assert all(larger[number] >= tokens for number, tokens in smaller.items())
        for sample, keep in zip(samples[:2], (4, 2), strict=True):
            left = sorted(left, key=lambda genome: fitness.mean(genome, sample.items()))[:keep]
            more = sum(sample.values())
            assert {genome for genome in used if sum(used[genome].values()) > more} == {old.incumbent, *left}
        best = min([old.incumbent, *left], key=lambda genome: fitness.mean(genome, samples[2].items()))
        assert new.incumbent == best
        assert new.fitness == pytest.approx(fitness.mean(best, samples[2].items()), rel=1e-12)


@pytest.mark.parametrize(
    # Sequences of 8192 are cut by the first step, and the second runs that one again.
    ("length", "second"),
    [(2048, 14336), (8192, 16384)],
)
def test_the_paper_s_setting_takes_a_million_tokens_a_generation(length, second):
    method = EvoPress(1, 128, [16, 4, 1], [2048, 16384, 131072], initial_tokens=2048)
    units = equal(40)
    state = search(method, units, 1200, Additive(units, 0), [length] * 64, 0)
    assert state.tokens - 2048 == 128 * 2048 + 16 * second + 4 * (131072 - 16384) + 131072


@pytest.mark.parametrize("tokens", [1, 7, 64, 150, 199])
def test_a_sample_is_whole_sequences_and_one_cut_to_the_token(tokens):
    samples = set()
    for seed in range(20):
        ((sample,),) = draw_nested(LENGTHS, (tokens,), np.random.default_rng(seed))
        samples.add(sample)
    for sample in samples:
        numbers = [number for number, _ in sample.parts]
        assert len(set(numbers)) == len(numbers)
        assert sum(used for _, used in sample.parts) == sample.tokens == tokens
        assert all(used == LENGTHS[number] for number, used in sample.parts[:-1])
        assert 0 < sample.parts[-1][1] <= LENGTHS[sample.parts[-1][0]]
    assert len(samples) > 1 or tokens == sum(LENGTHS)


@pytest.mark.parametrize("seed", range(20))
def test_each_nested_sample_has_its_tokens_and_begins_with_the_uncut_portions_of_the_one_before(seed):
    steps = (5, 20, 20, 50, 90, 199)
    samples = draw_nested(LENGTHS, steps, np.random.default_rng(seed))
    for tokens, portions in zip(steps, samples, strict=True):
        parts = [part for portion in portions for part in portion.parts]
        assert sum(used for _, used in parts) == tokens
        assert len({number for number, _ in parts}) == len(parts)
        assert all(used == LENGTHS[number] for number, used in parts[:-1])
    for smaller, larger in itertools.pairwise(samples):
        number, used = smaller[-1].parts[-1]
        whole = smaller if used == LENGTHS[number] else smaller[:-1]
        assert larger[: len(whole)] == whole
        assert number in {other for portion in larger[len(whole) :] for other, _ in portion.parts} or whole == smaller
    assert samples[1] == samples[2]


def test_empty_sequences_are_in_no_sample():
    assert draw_nested([0, 5, 0], (5,), np.random.default_rng(0)) == [(Sample(((1, 5),)),)]


def test_a_sequence_of_one_token_which_scores_nothing_is_never_used():
    fitness = PerToken([1, 20] * 5)
    list(generations(SMALL, fitness))
    assert {number for _, sample in fitness.calls for number, _ in sample.parts} == {1, 3, 5, 7, 9}


def test_another_allocator_s_answer_joins_the_first_candidates():
    units = equal()
    fitness = Additive(units, 5)
    every = itertools.product(range(3), repeat=6)
    start = min((g for g in every if size(units, g) <= 170), key=fitness.exact)
    states = []
    final = search(SMALL, units, 170, fitness, LENGTHS, 0, after=lambda *pair: states.append(pair), start=list(start))
    assert fitness.calls[0][0][-1] == start
    assert states[0][0].incumbent == final.incumbent == start
    assert states[0][1].candidates == len(fitness.calls[0][0])


def test_a_problem_with_one_genome_ends():
    fitness = Additive([unit("u", 10)], 0)
    state = search(SMALL, [unit("u", 10)], 30, fitness, LENGTHS, 0)
    assert (state.step, state.incumbent, state.evaluated) == (6, (1,), 1)
    few = Additive(equal(2), 0)
    search(SMALL, equal(2), 60, few, LENGTHS, 0)
    assert {genome for genomes, _, _ in few.calls for genome in genomes} == {(1, 1), (0, 2), (2, 0)}


def test_the_config_takes_lists():
    method = instantiate(OmegaConf.load(CONFIG), survivors=[3, 1], tokens=[10, 20])
    assert (method.survivors, method.tokens) == ((3, 1), (10, 20))
    assert hash(method) == hash(EvoPress(survivors=(3, 1), tokens=(10, 20)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"survivors": (4, 1)}, r"survivors=\[4, 1\] has fewer numbers than tokens="),
        ({"tokens": [10]}, r"has more numbers than tokens=\[10\]"),
        ({"survivors": (2, 4, 1)}, r"survivors=\[2, 4, 1\] must be whole numbers from 1 up that never rise"),
        ({"survivors": (4, 0, 0)}, r"survivors=\[4, 0, 0\] must be whole"),
        ({"survivors": (4, 2, 2)}, r"survivors=\[4, 2, 2\] must end with 1"),
        ({"survivors": (1, 1, 1)}, r"survivors=\[1, 1, 1\] begins with fewer survivors than its 3 steps"),
        ({"offspring": 2}, r"survivors=\[4, 2, 1\] begins with more than offspring=2"),
        ({"tokens": (10, 20, 15)}, r"tokens=\[10, 20, 15\] must be whole numbers from 1 up that never fall"),
        ({"tokens": (0, 20, 30)}, r"tokens=\[0, 20, 30\] must be"),
        ({"survivors": (), "tokens": ()}, r"survivors=\[\] must be"),
        ({"tokens": "512"}, "tokens=512 must be a list of whole numbers"),
        ({"survivors": 4}, "survivors=4 must be a list of whole numbers"),
        ({"generations": 0}, "generations=0 is out of range"),
        ({"offspring": 0}, "offspring=0 is out of range"),
        ({"offspring": 2.5}, "offspring=2.5 is out of range: a whole number"),
        ({"initial_candidates": 0}, "initial_candidates=0"),
        ({"initial_tokens": 0}, "initial_tokens=0"),
        ({"mutations": 0}, "mutations=0"),
        ({"across": 1.5}, "across=1.5 is out of range"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        EvoPress(**fields)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [40, 40]}, r"tokens=\[20, 50, 90\] asks for 90 tokens at once: the calibration has 80"),
        ({"lengths": [1] * 100 + [80]}, "asks for 90 tokens at once: the calibration has 80"),
        ({"seed": -1}, "seed=-1"),
        ({"budget": 100}, "below the lowest level"),
        ({"budget": 300}, "above the highest level"),
        ({"start": (2, 2, 2, 2, 2, 2)}, "start costs 240: the budget is 180"),
        ({"start": (1, 1)}, "start holds 2 choices that are not those of these 6 units"),
        ({"state": State(1, (0, 0, 0, 0, 0, 3), 0.0, 0, 0)}, "state holds 6 choices that are not those"),
    ],
)
def test_wrong_searches_are_refused_before_anything_is_evaluated(arguments, message):
    def evaluate(genomes, sample):
        raise AssertionError("evaluated")

    given = {"budget": 180, "lengths": LENGTHS, "seed": 0, **arguments}
    with pytest.raises(UserError, match=message) as raised:
        search(SMALL, equal(), fitness=evaluate, **given)
    assert "\n" not in str(raised.value)


def test_more_initial_tokens_than_there_are_is_refused():
    with pytest.raises(UserError, match="initial_tokens=500 asks for 500 tokens at once: the calibration has 199"):
        search(replace(SMALL, initial_tokens=500), equal(), 180, lambda genomes, _: [], LENGTHS, 0)


def test_samples_are_cut_to_the_tokens_that_there_are():
    cut = EvoPress().within(700)
    assert (cut.tokens, cut.initial_tokens) == ((512, 700, 700), 700)
    cut.check_tokens(700)
    assert EvoPress().within(10_000) == EvoPress()


def test_more_generations_and_nothing_else_go_on_from_the_states_of_fewer():
    assert replace(SMALL, generations=9).fingerprint() == SMALL.fingerprint()
    assert replace(SMALL, offspring=9).fingerprint() != SMALL.fingerprint()


def test_the_plan_counts_the_tokens_that_are_measured_where_samples_end_with_a_sequence():
    method = replace(SMALL, initial_candidates=1)
    state = search(method, equal(12), 360, PerToken([10] * 20), [10] * 20, 0)
    assert method.measured_tokens(200) == state.tokens
