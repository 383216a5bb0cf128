import math

import pytest

from hasten.accel.compression.search.base import Problem, State
from hasten.accel.compression.search.random_search import RandomSearch
from hasten.accel.errors import UserError
from tests.compression.search.problems import LENGTHS, Additive, PerToken, equal, search

SMALL = RandomSearch(rounds=6, candidates=8, tokens=60)
START = (1,) * 12


def test_measured_losses_do_not_change_the_candidates():
    tried = []
    for fitness in (Additive(equal(12), 0), PerToken(LENGTHS)):
        search(SMALL, equal(12), 360, fitness, LENGTHS, 0)
        tried.append([call[0] for call in fitness.calls])
    assert tried[0] == tried[1]


def test_the_best_candidate_of_all_rounds_is_the_answer():
    fitness = Additive(equal(12), 0)
    answer = search(SMALL, equal(12), 360, fitness, LENGTHS, 0)
    losses = {
        genome: loss for genomes, _, values in fitness.calls for genome, loss in zip(genomes, values, strict=True)
    }
    assert len(losses) > 40
    assert answer.incumbent == min(losses, key=losses.__getitem__)


def test_all_candidates_are_compared_on_one_sample_of_the_tokens():
    fitness = PerToken(LENGTHS)
    search(SMALL, equal(12), 360, fitness, LENGTHS, 0)
    (sample,) = {sample for _, sample in fitness.calls}
    assert sample.tokens == 60


def test_where_there_are_fewer_tokens_all_are_used():
    fitness = PerToken([10, 10])
    answer = search(SMALL, equal(12), 360, fitness, [10, 10], 0)
    assert answer.tokens == SMALL.measured_tokens(20) == (1 + 6 * 8) * 20


def test_one_move_of_one_switch_changes_two_units_of_the_start():
    fitness = Additive(equal(12), 0)
    method = RandomSearch(rounds=20, max_moves=1, mutations=1)
    list(method.search(Problem(equal(12), 360, LENGTHS, 0, START), lambda lots: [fitness(*lot) for lot in lots]))
    assert fitness.calls[0][0] == [START]
    for genomes, _, _ in fitness.calls[1:]:
        assert {sum(a != b for a, b in zip(genome, START, strict=True)) for genome in genomes} == {2}


def test_a_start_that_cannot_be_measured_gives_way_to_any_candidate_that_can():
    broken = State(0, START, math.nan, 1, 60, list(START))
    for state in (broken, State.from_json(broken.to_json())):
        answer = search(SMALL, equal(12), 360, Additive(equal(12), 0), LENGTHS, 0, state=state)
        assert answer.incumbent != START
        assert math.isfinite(answer.fitness)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 0}, "rounds=0 is out of range"),
        ({"candidates": 0}, "candidates=0 is out of range"),
        ({"tokens": 1.5}, "tokens=1.5 is out of range: a whole number"),
        ({"max_moves": 0}, "max_moves=0 is out of range"),
        ({"across": 2}, "across=2 is out of range: a share from 0 to 1"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        RandomSearch(**fields)
