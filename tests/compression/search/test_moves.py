import itertools
from dataclasses import replace

import numpy as np

from hasten.accel.compression.allocators.base import DROP, size
from hasten.accel.compression.search.base import State
from tests.compression.search.problems import LENGTHS, SMALL, Additive, droppable, part, search, unequal, unit


def test_switches_within_groups_keep_the_bits_of_every_group():
    units = [unit(f"u{i}", 10 + 6 * (i % 2)) for i in range(12)]

    def totals(method):
        fitness = Additive(units, 0)
        search(method, units, 3 * 156, fitness, LENGTHS, 0)
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
    search(replace(SMALL, generations=1, offspring=600), units, 10000, fitness, LENGTHS, 0)
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
    state = search(replace(SMALL, offspring=60, survivors=(1,), tokens=(20,)), units, budget, fitness, LENGTHS, 0)
    for (genomes, _, _), (later, _, _) in itertools.pairwise(fitness.calls[1:]):
        assert all(sum(a != b for a, b in zip(genome, genomes[0], strict=True)) <= 10 for genome in genomes)
        assert later[0] in genomes  # the parent comes first
    assert size(units, state.incumbent) > budget - 40  # a step of the smallest units would fit otherwise


def test_a_level_of_exactly_the_budget_is_the_only_first_candidate():
    fitness = Additive(unequal(), 0)
    search(SMALL, unequal(), 3 * 135, fitness, LENGTHS, 0)
    assert fitness.calls[0][0] == [(1,) * 6]


def test_between_two_levels_the_first_candidates_are_lowered_from_the_upper_one():
    units = [unit(f"u{i}", 10, (2, 3, 4, 8)) for i in range(20)]
    fitness, states = Additive(units, 0), []
    search(SMALL, units, 700, fitness, LENGTHS, 0, after=lambda state, _: states.append(state))
    genomes, sample, values = fitness.calls[0]
    assert len(genomes) == SMALL.initial_candidates
    assert sample.tokens == SMALL.initial_tokens
    assert all(max(genome) == 2 and size(units, genome) == 700 for genome in genomes)
    assert states[0].incumbent == genomes[int(np.argmin(values))]


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
    search(SMALL, units, 900, fitness, LENGTHS, 0, after=lambda state, _: states.append(state))
    numbers = []
    for genomes, _, _ in fitness.calls[1:]:
        dropped = [
            [u.kind for u, g in zip(units, genome, strict=True) if u.choices[g].level == DROP] for genome in genomes
        ]
        numbers += [(kinds.count("attention"), kinds.count("mlp")) for kinds in dropped]
    assert len(set(numbers)) == 1
    assert sum(numbers[0]) > 0
    assert len({state.incumbent for state in states}) > 1


def test_a_restored_part_takes_over_the_levels_of_the_part_it_replaces():
    units = droppable(parts=7)  # four of kind mlp
    start = [1, 2, 0, *[1, 0, 1] * 5, 0, 0, 0]
    fitness = Additive(units, 0)
    method = replace(SMALL, generations=1, offspring=200)
    search(method, units, size(units, start), fitness, LENGTHS, 0, state=State(0, tuple(start), 0.0, 0, 0))
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
    search(method, units, 3 * 120, fitness, LENGTHS, 0, after=lambda state, _: states.append(state))
    assert states[0].incumbent[6] == 1
    assert states[-1].fitness == 0.0
    assert states[-1].incumbent == (1, 2, 2, 1, 2, 2, 0, 0, 0, 1, 2, 2)


def test_parts_inside_a_dropped_part_are_dropped_and_restored_with_it():
    units = []
    for i in range(4):
        units += [part(f"b{i}", "block"), part(f"a{i}", "attention", f"b{i}"), part(f"m{i}", "mlp", f"b{i}")]
        units += [unit(f"a{i}.w", 10, part_of=f"a{i}"), unit(f"m{i}.w", 20, part_of=f"m{i}")]
    fitness = Additive(units, 1)
    search(replace(SMALL, generations=20), units, 200, fitness, LENGTHS, 0)
    blocks = [genome[k : k + 5] for genomes, _, _ in fitness.calls for genome in genomes for k in (0, 5, 10, 15)]
    assert {block for block in blocks if block[0] == 0} == {(0, 0, 0, 0, 0)}
    assert any(block[:2] == (1, 0) for block in blocks)
    assert all(block[3] == 0 for block in blocks if block[1] == 0)
