import dataclasses

import pytest
import torch

from hasten.accel.compression.search.samples import Sample
from hasten.cluster.actors.evaluator import Evaluator
from hasten.cluster.programs import search
from hasten.cluster.programs.search import Evaluators
from tests.cluster import searching
from tests.cluster.failing import Die, failing, no_stragglers  # noqa: F401
from tests.models import tiny

TOKENS = tiny.tokens(6, 16)
SAMPLES = [Sample(((0, 16),)), Sample(((0, 16), (1, 16), (2, 16), (3, 16), (4, 7)))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model for evaluators, and what one process finds on it."""
    folder = tmp_path_factory.mktemp("evaluators")
    source = tiny.save(folder / "original", "llama", dtype=torch.bfloat16)
    model, genomes, alone = searching.make(source, folder / "levels", TOKENS, 7)
    return model, genomes, [alone.evaluate(genomes, sample) for sample in SAMPLES]


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_evaluators_finds_what_one_process_finds(workers, made, ray_session):
    model, genomes, expected = made
    pool = Evaluators(model, workers)
    # One sequence is shared by cutting the candidates, several by cutting the sample.
    assert [pool(genomes, sample) for sample in SAMPLES] == expected
    used = pool.close()
    assert used["cpu_seconds"] > 0
    assert used["block_runs"] > 0


@pytest.mark.ray
def test_what_was_measured_is_not_measured_again(made, ray_session):
    model, genomes, expected = made
    pool = Evaluators(model, 1)
    assert pool(genomes[:4], SAMPLES[1]) == expected[1][:4]
    assert pool([*genomes, genomes[0]], SAMPLES[1]) == [*expected[1], expected[1][0]]
    assert pool.evaluated == len(genomes) * 5
    # The first sequence is known from the sample that it was a part of.
    assert pool(genomes, SAMPLES[0]) == expected[0]
    assert pool.evaluated == len(genomes) * 5
    pool.close()


@pytest.mark.ray
def test_sequences_that_are_known_of_some_candidates_change_no_bit(made, ray_session):
    model, genomes, _ = made
    model = dataclasses.replace(model, batch=2)
    expected = searching.alone(model).evaluate(genomes, SAMPLES[1])
    other = Evaluators(model, 2)
    # One sequence alone runs in another batch than with its neighbour, and the two are kept apart.
    other.prefetch([(genomes[1:3], Sample(((0, 16), (1, 16)))), (genomes[:2], Sample(((2, 16),))), ([], SAMPLES[0])])
    assert other(genomes, SAMPLES[1]) == expected
    other.close()


@pytest.mark.ray
@pytest.mark.usefixtures("no_stragglers", "ray_session")
def test_an_evaluator_that_dies_at_its_second_call_is_replaced_and_the_result_is_the_same(made, tmp_path, monkeypatch):
    model, genomes, expected = made
    monkeypatch.setattr(search, "Evaluator", failing(Evaluator, "losses", 2, Die(tmp_path / "dead")))
    pool = Evaluators(model, 2)
    assert [pool(genomes, sample) for sample in SAMPLES] == expected
    assert pool.restarts == 1
    pool.close()
