"""Measurements that a search requests, and its answer."""

from hasten.accel.compression.search.base import Problem
from tests.compression.search.problems import LENGTHS, SMALL, Additive, equal, search, unequal


def test_the_answer_is_no_worse_than_the_start_on_all_tokens():
    units, start = equal(), (1, 1, 1, 1, 1, 1)
    everything = sum(LENGTHS)

    def misleading(genomes, sample):
        # Moves away from the start look better on any few tokens, and are worse on all.
        return [float((genome == start) == (sample.tokens < everything)) for genome in genomes]

    states = []
    found = search(SMALL, units, 180, misleading, LENGTHS, 0, after=lambda state, _: states.append(state), start=start)
    assert states[-1].incumbent != start
    assert found.incumbent == start
    assert found.fitness == 0.0
    assert found.tokens == states[-1].tokens + 2 * everything


def test_a_selection_step_requests_all_its_measurements_in_one_call():
    fitness = Additive(unequal(), 0)
    calls = []

    def measure(requests):
        calls.append([(tuple(genomes), sample) for genomes, sample in requests])
        return [fitness(genomes, sample) for genomes, sample in requests]

    steps = list(SMALL.search(Problem(unequal(), 400, LENGTHS, 0), measure))
    # One call for the first candidates, and one for each of the three steps of every generation.
    assert len(calls) == 1 + 3 * 6
    assert sum(step.stats.evaluated for step in steps) == steps[-1].state.evaluated
    # The parent joins the survivors, though these were measured on parts of the sample before.
    assert max(len(requests) for requests in calls) > 1
    assert all(genomes for requests in calls for genomes, _ in requests)
