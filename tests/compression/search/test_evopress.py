import itertools
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from accel.compression.allocation.base import DROP, Choice, Unit, size
from accel.compression.search.evopress import EvoPress, Sample, State, draw
from accel.errors import UserError

CONFIG = Path(__file__).parents[3] / "conf" / "allocator" / "evopress.yaml"
LENGTHS = [7, 30, 12, 25, 40, 3, 18, 64]
SMALL = EvoPress(generations=6, offspring=8, survivors=(4, 2, 1), tokens=(20, 50, 90), initial_tokens=30)


def unit(name, weights, levels=(2, 3, 4), kind="mlp", part_of=None):
    choices = tuple(Choice(str(level), weights * level) for level in levels)
    return Unit(name, (name,), 0, kind, weights, choices, part_of)


def part(name, kind="attention", part_of=None):
    return Unit(name, (), 0, kind, 0, (Choice(DROP, 0), Choice("keep", 0)), part_of)


def equal(count=6):
    return [unit(f"u{i}", 10) for i in range(count)]


def unequal():
    return [unit(f"u{i}", weights) for i, weights in enumerate([10, 13, 17, 24, 31, 40])]


def droppable(parts=3, levels=(2, 3, 4)):
    units = []
    for i in range(parts):
        kind = "attention" if i % 2 else "mlp"
        units += [part(f"p{i}", kind), unit(f"a{i}", 10, levels, part_of=f"p{i}")]
        units += [unit(f"b{i}", 20, levels, part_of=f"p{i}")]
    return units


class Additive:
    """Fitness that adds up over the units, with a noise of 1e-9 that depends on genome and sample; keeps the calls."""

    def __init__(self, units, seed):
        rng = np.random.default_rng(seed)
        self.units = units
        self.costs = [np.sort(rng.random(len(u.choices)))[::-1].tolist() for u in units]
        for index, u in enumerate(units):
            if u.choices[0].level == DROP:
                # To be without a part is worse than all that can be done to what is inside.
                inside = sum(cost[0] for other, cost in zip(units, self.costs, strict=True) if other.part_of == u.name)
                self.costs[index] = [inside + self.costs[index][0], 0.0]
        self.calls = []

    def exact(self, genome):
        dropped = {u.name for u, g in zip(self.units, genome, strict=True) if u.choices[g].level == DROP}
        terms = zip(self.units, self.costs, genome, strict=True)
        return sum(cost[g] for u, cost, g in terms if u.part_of not in dropped)

    def __call__(self, genomes, sample):
        values = [self.exact(g) + 1e-9 * zlib.crc32(repr((g, sample)).encode()) / 2**32 for g in genomes]
        self.calls.append((list(genomes), sample, values))
        return values

    def optimum(self, budget):
        every = itertools.product(*(range(len(u.choices)) for u in self.units))
        return min(self.exact(g) for g in every if size(self.units, g) <= budget)


def problem(seed):
    """Units of random sizes and levels, some of them equal, some inside parts that can be dropped, and a budget."""
    rng = np.random.default_rng(seed)
    units = []
    for block in range(rng.integers(1, 4)):
        holder = None
        if rng.random() < 0.5:
            holder = f"p{block}"
            units.append(part(holder))
        for i in range(rng.integers(1, 5)):
            weights = int(rng.integers(1, 30)) if rng.random() < 0.5 else 16
            levels = sorted(rng.choice([1, 2, 3, 4, 6, 8], rng.integers(1, 5), replace=False).tolist())
            units.append(unit(f"{block}.{i}", weights, levels, part_of=holder))
    low, high = size(units, [0] * len(units)), size(units, [len(u.choices) - 1 for u in units])
    return units, int(rng.integers(low, high + 1))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [2.5, 3.0])
@pytest.mark.parametrize("units", [equal(), unequal()], ids=["equal", "unequal"])
def test_it_finds_the_optimum_that_brute_force_finds(units, budget, seed):
    budget = int(budget * sum(u.weights for u in units))
    fitness = Additive(units, seed)
    state = replace(SMALL, generations=40, offspring=16).search(units, budget, fitness, LENGTHS, seed)
    assert fitness.exact(state.parent) == fitness.optimum(budget)


@pytest.mark.parametrize("seed", range(10))
def test_it_drops_the_parts_that_brute_force_drops(seed):
    units = []
    for i in range(6):
        units += [part(f"p{i}"), unit(f"u{i}", 10, (16,), part_of=f"p{i}")]
    fitness = Additive(units, seed)
    state = replace(SMALL, generations=10).search(units, 4 * 160, fitness, LENGTHS, seed)
    assert fitness.exact(state.parent) == fitness.optimum(4 * 160)


@pytest.mark.parametrize("seed", range(10))
def test_levels_and_drops_under_one_budget_reach_the_optimum(seed):
    units = droppable()
    fitness = Additive(units, seed)
    state = replace(SMALL, generations=30, offspring=16).search(units, 225, fitness, LENGTHS, seed)
    assert fitness.exact(state.parent) == fitness.optimum(225)


@pytest.mark.parametrize("seed", range(80))
def test_no_candidate_is_over_the_budget_or_evaluated_twice_at_once(seed):
    units, budget = problem(seed)
    fitness = Additive(units, seed)
    method = replace(SMALL, grouped=seed % 3 > 0, across=0.5 * (seed % 2))
    state = method.search(units, budget, fitness, LENGTHS, seed)
    assert state.generation == 6
    for genomes, _, _ in fitness.calls:
        assert len(set(genomes)) == len(genomes)
        for genome in genomes:
            assert size(units, genome) <= budget
            dropped = {u.name for u, g in zip(units, genome, strict=True) if u.choices[g].level == DROP}
            assert all(g == 0 for u, g in zip(units, genome, strict=True) if u.part_of in dropped)


def test_one_seed_gives_one_result_and_another_seed_another_way_to_it():
    units = unequal()
    runs = []
    for seed in (3, 3, 4):
        fitness = Additive(units, 0)
        runs.append((SMALL.search(units, 400, fitness, LENGTHS, seed), fitness.calls))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize("units", [unequal(), droppable()], ids=["levels", "drops"])
def test_a_search_goes_on_after_any_generation_as_if_it_never_stopped(units):
    budget = int(2.5 * sum(u.weights for u in units))
    whole = Additive(units, 0)
    states = []
    final = SMALL.search(units, budget, whole, LENGTHS, 1, after=lambda state, info: states.append(state))
    assert [state.generation for state in states] == list(range(7))
    for state in states:
        rest = Additive(units, 0)
        known = State.from_json(json.loads(json.dumps(state.to_json())))
        assert known == state
        assert SMALL.search(units, budget, rest, LENGTHS, 1, state=known) == final
        assert rest.calls == whole.calls[len(whole.calls) - len(rest.calls) :]
        assert len(rest.calls) == 3 * (6 - state.generation)


def test_the_parent_is_measured_anew_in_the_last_step_and_stays_unless_an_offspring_is_better():
    units = equal(8)

    def noisy(genomes, sample):
        values = [1 + zlib.crc32(repr((g, sample)).encode()) % 5 for g in genomes]
        calls.append(dict(zip(genomes, values, strict=True)))
        return values

    calls, states = [], []
    replace(SMALL, generations=30).search(units, 240, noisy, LENGTHS, 0, after=lambda *pair: states.append(pair))
    kept = 0
    for index, ((old, _), (new, info)) in enumerate(itertools.pairwise(states)):
        first, second, last = calls[1 + 3 * index : 4 + 3 * index]
        assert old.parent not in first
        assert old.parent not in second
        assert info.parent_fitness == last[old.parent]
        assert new.fitness == last[new.parent] == min(last.values())
        assert new.fitness < info.parent_fitness or new.parent == old.parent
        assert info.changed == sum(a != b for a, b in zip(old.parent, new.parent, strict=True))
        kept += new.parent == old.parent
    assert 0 < kept < 30


def test_candidates_that_cannot_be_measured_never_win():
    units = equal()
    start = (1, 1, 1, 1, 1, 1)
    state = SMALL.search(units, 180, lambda gs, _: [1.0 if g == start else math.nan for g in gs], LENGTHS, 0)
    assert state.parent == start
    broken = SMALL.search(units, 180, lambda gs, _: [math.nan] * len(gs), LENGTHS, 0)
    assert broken.to_json()["fitness"] is None
    assert State.from_json(broken.to_json()).fitness == math.inf


def test_each_step_compares_fewer_candidates_on_more_tokens():
    fitness, infos = Additive(equal(12), 0), []
    state = SMALL.search(equal(12), 360, fitness, LENGTHS, 0, after=lambda _, info: infos.append(info))
    steps = [(len(genomes), sample.tokens) for genomes, sample, _ in fitness.calls]
    assert steps == [(1, 30)] + [(8, 20), (4, 50), (2 + 1, 90)] * 6
    assert state.evaluated == 1 + 6 * (8 + 4 + 3) == sum(info.evaluated for info in infos)
    assert state.tokens == 30 + 6 * (8 * 20 + 4 * 50 + 3 * 90) == sum(info.tokens for info in infos)
    for (before, _, values), (after, _, _) in itertools.pairwise(fitness.calls[1:4]):
        best = sorted(before, key=lambda genome: values[before.index(genome)])
        assert set(after) - {(1,) * 12} <= set(best[: len(after)])


def test_the_first_step_of_the_paper_s_setting_takes_its_number_of_tokens():
    method = EvoPress(1, 128, [16, 4, 1], [2048, 16384, 131072], initial_tokens=2048)
    units = equal(40)
    state = method.search(units, 1200, Additive(units, 0), [8192] * 64, 0)
    assert state.tokens - 2048 == 128 * 2048 + 16 * 16384 + 5 * 131072


@pytest.mark.parametrize("tokens", [1, 7, 64, 150, 199])
def test_a_sample_is_whole_sequences_and_one_cut_to_the_token(tokens):
    samples = {draw(LENGTHS, tokens, np.random.default_rng(seed)) for seed in range(20)}
    for sample in samples:
        numbers = [number for number, _ in sample.parts]
        assert len(set(numbers)) == len(numbers)
        assert sum(used for _, used in sample.parts) == sample.tokens == tokens
        assert all(used == LENGTHS[number] for number, used in sample.parts[:-1])
        assert 0 < sample.parts[-1][1] <= LENGTHS[sample.parts[-1][0]]
    assert len(samples) > 1


def test_empty_sequences_are_in_no_sample():
    assert draw([0, 5, 0], 5, np.random.default_rng(0)) == Sample(((1, 5),))


def test_switches_within_groups_keep_the_bits_of_every_group():
    units = [unit(f"u{i}", 10 + 6 * (i % 2)) for i in range(12)]

    def totals(method):
        fitness = Additive(units, 0)
        method.search(units, 3 * 156, fitness, LENGTHS, 0)
        return {
            tuple(sum(unit.choices[g].bits for unit, g in zip(units[k::2], genome[k::2], strict=True)) for k in (0, 1))
            for genomes, _, _ in fitness.calls
            for genome in genomes
        }

    assert totals(replace(SMALL, across=0.0)) == {(180, 288)}
    assert len(totals(replace(SMALL, across=0.5))) > 3
    assert len(totals(replace(SMALL, across=0.0, grouped=False))) > 3


def test_an_offspring_has_the_smaller_of_two_random_numbers_of_switches():
    units = [unit(f"u{i}", 10, range(2, 9)) for i in range(200)]
    fitness = Additive(units, 0)
    replace(SMALL, generations=1, offspring=600).search(units, 10000, fitness, LENGTHS, 0)
    changed = np.array([sum(g != 3 for g in genome) for genome in fitness.calls[1][0]])
    assert set(changed.tolist()) <= set(range(2, 7))
    # 5, 3 and 1 in 9; five standard deviations of a share of 600 are 10 per cent at most.
    for switches, share in ((1, 5 / 9), (2, 3 / 9), (3, 1 / 9)):
        assert abs(np.isin(changed, [2 * switches, 2 * switches - (switches > 1)]).mean() - share) < 0.1


def test_moves_across_groups_change_ten_units_at_most():
    units = [unit("large", 1000), *(unit(f"u{i}", 9 + i, (2, 3, 4, 5)) for i in range(30))]
    parent = [0] + [2] * 30
    budget = size(units, parent)
    fitness = Additive(units, 0)
    state = replace(SMALL, offspring=60, survivors=(1,), tokens=(20,)).search(units, budget, fitness, LENGTHS, 0)
    for (genomes, _, _), (later, _, _) in itertools.pairwise(fitness.calls[1:]):
        assert all(sum(a != b for a, b in zip(genome, genomes[0], strict=True)) <= 10 for genome in genomes)
        assert later[0] in genomes  # the parent comes first
    assert size(units, state.parent) > budget - 40  # a step of the smallest units would fit otherwise


def test_a_level_of_exactly_the_budget_is_the_only_first_candidate():
    fitness = Additive(unequal(), 0)
    SMALL.search(unequal(), 3 * 135, fitness, LENGTHS, 0)
    assert fitness.calls[0][0] == [(1,) * 6]


def test_between_two_levels_the_first_candidates_are_lowered_from_the_upper_one():
    units = [unit(f"u{i}", 10, (2, 3, 4, 8)) for i in range(20)]
    fitness, states = Additive(units, 0), []
    SMALL.search(units, 700, fitness, LENGTHS, 0, after=lambda state, _: states.append(state))
    genomes, sample, values = fitness.calls[0]
    assert len(genomes) == SMALL.initial_candidates
    assert sample.tokens == SMALL.initial_tokens
    assert all(max(genome) == 2 and size(units, genome) == 700 for genome in genomes)
    assert states[0].parent == genomes[int(np.argmin(values))]


def test_another_allocator_s_answer_joins_the_first_candidates():
    units = equal()
    fitness = Additive(units, 5)
    every = itertools.product(range(3), repeat=6)
    start = min((g for g in every if size(units, g) <= 170), key=fitness.exact)
    states = []
    final = SMALL.search(units, 170, fitness, LENGTHS, 0, after=lambda *pair: states.append(pair), start=list(start))
    assert fitness.calls[0][0][-1] == start
    assert states[0][0].parent == final.parent == start
    assert states[0][1].offspring == len(fitness.calls[0][0])


def test_dropping_alone_swaps_parts_of_a_kind_and_keeps_their_numbers():
    units = []
    for i in range(6):
        for kind in ("attention", "mlp"):
            units += [
                part(f"{kind}{i}", kind),
                unit(f"{kind}{i}.w", 10 if kind == "mlp" else 4, (16,), kind, f"{kind}{i}"),
            ]
    fitness = Additive(units, 0)
    states = []
    SMALL.search(units, 900, fitness, LENGTHS, 0, after=lambda state, _: states.append(state))
    numbers = []
    for genomes, _, _ in fitness.calls[1:]:
        dropped = [
            [u.kind for u, g in zip(units, genome, strict=True) if u.choices[g].level == DROP] for genome in genomes
        ]
        numbers += [(kinds.count("attention"), kinds.count("mlp")) for kinds in dropped]
    assert len(set(numbers)) == 1
    assert sum(numbers[0]) > 0
    assert len({state.parent for state in states}) > 1


def test_a_part_that_comes_back_takes_over_the_levels_of_the_part_that_goes():
    units = droppable(parts=7)  # four of kind mlp
    start = [1, 2, 0, *[1, 0, 1] * 5, 0, 0, 0]
    fitness = Additive(units, 0)
    method = replace(SMALL, generations=1, offspring=200)
    method.search(units, size(units, start), fitness, LENGTHS, 0, state=State(0, tuple(start), 0.0, 0, 0))
    swapped = [genome for genome in fitness.calls[0][0] if genome[0] == 0 and genome[18] == 1]
    assert any(genome == (0, 0, 0, *start[3:18], 1, 2, 0) for genome in swapped)


def test_a_useless_part_is_dropped_for_the_bits_inside_it():
    units = droppable(parts=4)
    inside = [index for index, u in enumerate(units) if u.part_of]

    def fitness(genomes, _):
        # p2 does nothing; the others need all the bits they can get.
        lost = [sum(10 * (g[i] == 0) for i in (0, 3, 9)) for g in genomes]
        levels = [sum(2 - g[i] for i in inside if units[i].part_of != "p2" and g[i] < 2) for g in genomes]
        return [float(a + b) for a, b in zip(lost, levels, strict=True)]

    states = []
    method = replace(SMALL, generations=25, offspring=16)
    method.search(units, 3 * 120, fitness, LENGTHS, 0, after=lambda state, _: states.append(state))
    assert states[0].parent[6] == 1
    assert states[-1].fitness == 0.0
    assert states[-1].parent == (1, 2, 2, 1, 2, 2, 0, 0, 0, 1, 2, 2)


def test_parts_inside_a_dropped_part_are_out_with_it_and_come_back_with_it():
    units = []
    for i in range(4):
        units += [part(f"b{i}", "block"), part(f"a{i}", "attention", f"b{i}"), part(f"m{i}", "mlp", f"b{i}")]
        units += [unit(f"a{i}.w", 10, part_of=f"a{i}"), unit(f"m{i}.w", 20, part_of=f"m{i}")]
    fitness = Additive(units, 1)
    replace(SMALL, generations=20).search(units, 200, fitness, LENGTHS, 0)
    blocks = [genome[k : k + 5] for genomes, _, _ in fitness.calls for genome in genomes for k in (0, 5, 10, 15)]
    assert {block for block in blocks if block[0] == 0} == {(0, 0, 0, 0, 0)}
    assert any(block[:2] == (1, 0) for block in blocks)
    assert all(block[3] == 0 for block in blocks if block[1] == 0)


def test_a_problem_with_one_genome_ends():
    fitness = Additive([unit("u", 10)], 0)
    state = SMALL.search([unit("u", 10)], 30, fitness, LENGTHS, 0)
    assert (state.generation, state.parent, state.evaluated) == (6, (1,), 1)
    few = Additive(equal(2), 0)
    SMALL.search(equal(2), 60, few, LENGTHS, 0)
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
        ({"seed": -1}, "seed=-1"),
        ({"budget": 100}, "below the lowest level"),
        ({"budget": 300}, "above the highest level"),
        ({"start": (2, 2, 2, 2, 2, 2)}, "start takes 240 bits: the budget is 180"),
        ({"start": (1, 1)}, "start holds 2 choices that are not those of these 6 units"),
        ({"state": State(1, (0, 0, 0, 0, 0, 3), 0.0, 0, 0)}, "state holds 6 choices that are not those"),
    ],
)
def test_wrong_searches_are_refused_before_anything_is_evaluated(arguments, message):
    def evaluate(genomes, sample):
        raise AssertionError("evaluated")

    given = {"budget": 180, "lengths": LENGTHS, "seed": 0, **arguments}
    with pytest.raises(UserError, match=message) as raised:
        SMALL.search(equal(), evaluate=evaluate, **given)
    assert "\n" not in str(raised.value)


def test_more_initial_tokens_than_there_are_is_refused():
    with pytest.raises(UserError, match="initial_tokens=500 asks for 500 tokens at once: the calibration has 199"):
        replace(SMALL, initial_tokens=500).search(equal(), 180, lambda genomes, _: [], LENGTHS, 0)


def test_without_a_search_it_says_that_it_needs_one():
    assert EvoPress.needs_evaluation
    with pytest.raises(UserError, match="needs a search"):
        EvoPress().allocate(equal(), 180)
