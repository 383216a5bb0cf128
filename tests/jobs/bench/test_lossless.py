from itertools import product

import pytest
import torch

from hasten.accel.decoding.sampling import Sampling
from hasten.accel.errors import UserError
from hasten.jobs.bench import lossless
from hasten.jobs.bench.measurements.distribution import measure, pairs
from hasten.jobs.bench.measurements.markov import MarkovTarget, chi_square, joint

SMALL = {"samples": 2000, "vocabulary": 3, "in_flight": 32}


def test_every_sampling_of_every_pair_is_tested_and_has_a_row():
    config = lossless.Config(
        verifiers=["sample_and_match", "speculative_sampling"], drafters=["prompt_lookup"], **SMALL
    )
    rows = list(measure(config, pairs(config)))
    assert all(row.freedom > 5 and row.tokens_per_pass > 1 for row in rows)
    metrics = lossless._metrics(rows)
    assert (metrics["tests"], metrics["biased"], metrics["refused"]) == (4, 0, 0)
    assert metrics["p_value_limit"] == lossless.LEVEL / 4
    assert lossless._section(config, rows).count("| follows |") == 4


def test_a_verifier_that_is_not_lossless_is_found_out():
    config = lossless.Config(verifiers=["typical"], drafters=["prompt_lookup"], **SMALL | {"samples": 500})
    (row, _) = measure(config, pairs(config))
    assert row.p_value < 1e-9
    assert lossless._verdict(row, 0.01) == "biased, as it says"
    assert lossless._metrics([row])["biased"] == 0


def test_a_pair_that_is_refused_says_why():
    config = lossless.Config(verifiers=["speculative_sampling"], drafters=["token_recycling"], **SMALL)
    rows = list(measure(config, pairs(config)))
    assert {lossless._verdict(row, 0.01) for row in rows} == {"refused"}
    text = lossless._section(config, rows)
    assert text.count("use verifier=sample_and_match") == 1


def test_a_lossy_verifier_has_one_drafter_unless_it_is_asked_for():
    tested = pairs(lossless.Config())
    assert sum(verifier == "typical" for verifier, _ in tested) == 1
    assert sum(verifier == "sample_and_match" for verifier, _ in tested) > 1


def test_names_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"verifiers=typicl is wrong: .*did you mean typical"):
        pairs(lossless.Config(verifiers=["typicl"]))


def test_the_target_answers_by_the_last_two_tokens_of_every_path():
    table = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    target = MarkovTarget(table)
    target.reserve(1, 100)
    target.prefill(0, [2, 1])
    found = target.forward([0], [[0, 1, 2, 2]], [[-1, 0, 0, 1]]).logits[0]
    assert torch.equal(found, torch.stack([table[1, 0], table[0, 1], table[0, 2], table[1, 2]]))
    target.commit(0, [0, 1])
    assert torch.equal(target.forward([0], [[2]], [[-1]]).logits[0, 0], table[1, 2])


def test_the_joint_distribution_sees_what_the_penalty_sees():
    table = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.5)
    found = joint(table, [0, 1], sampling, 2)
    for first, second in product(range(3), repeat=2):
        one = sampling.probs(sampling.penalised(table[0, 1], torch.tensor([0, 1])))[first]
        two = sampling.probs(sampling.penalised(table[1, first], torch.tensor([0, 1, first])))[second]
        torch.testing.assert_close(found[first, second], (one * two).double())
    torch.testing.assert_close(found.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_chi_square_by_hand():
    # (60 - 50)^2 / 50 twice; one degree of freedom: erfc(sqrt(4 / 2)).
    statistic, freedom, p_value = chi_square(torch.tensor([60, 40]), torch.tensor([0.5, 0.5]))
    assert (statistic, freedom) == (4.0, 1)
    assert p_value == pytest.approx(0.0455002639)
    # Two of 1 and 3 expected are one of 4.
    counts, probs = torch.tensor([50, 46, 0, 4]), torch.tensor([0.5, 0.46, 0.01, 0.03], dtype=torch.float64)
    assert chi_square(counts, probs) == (pytest.approx(0), 2, pytest.approx(1))
    assert chi_square(torch.tensor([99, 1]), torch.tensor([1.0, 0.0]))[2] == 0
