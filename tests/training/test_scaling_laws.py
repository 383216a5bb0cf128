"""Laws are recovered from rows that follow them, with intervals that contain the truth as often as they say."""

import random
from math import log2

import pytest

from hasten.accel.errors import UserError
from hasten.accel.training.scaling_laws import Costs, Row, ScalingLaw, choices

TRUE = {"parameters": 0.2, "tokens": 0.1, "batch": -0.05}
BASE = -4.0


def rows(noise=0.0, seed=0, batches=(8, 32)):
    generator = random.Random(seed)
    return [
        Row(
            {"parameters": size, "tokens": tokens, "batch": batch},
            BASE
            + TRUE["parameters"] * log2(size)
            + TRUE["tokens"] * log2(tokens)
            + TRUE["batch"] * log2(batch)
            + generator.gauss(0, noise),
        )
        for size in (1e5, 1e6, 1e7)
        for tokens in (3e4, 1e5, 1e6)
        for batch in batches
    ]


def test_coefficients_of_exact_rows_are_recovered():
    law = ScalingLaw.fit(rows())
    assert law.names == ("parameters", "tokens", "batch")
    assert [one.value for one in law.coefficients] == pytest.approx([BASE, *TRUE.values()], abs=1e-8)
    assert law.r_squared == pytest.approx(1.0)
    assert law.predict(parameters=2e6, tokens=1e5, batch=8).value == pytest.approx(
        BASE + 0.2 * log2(2e6) + 0.1 * log2(1e5) - 0.15
    )


def test_intervals_contain_the_truth_as_often_as_they_say():
    inside = 0
    for seed in range(300):
        one = ScalingLaw.fit(rows(0.1, seed), confidence=0.9).coefficients[1]
        inside += one.low <= TRUE["parameters"] <= one.high
    # Three standard deviations of a binomial count with 300 trials of 0.9.
    assert 254 <= inside <= 286


def test_the_interval_of_a_line_is_the_textbooks():
    # y = 1, 2, 4 at log2 x = 0, 1, 2: slope 1.5, residual variance 1/6, slope error sqrt(1/12), t = 12.706 at 1 degree.
    law = ScalingLaw.fit([Row({"tokens": 2.0**x}, y) for x, y in ((0, 1.0), (1, 2.0), (2, 4.0))])
    slope = law.coefficients[1]
    assert slope.value == pytest.approx(1.5)
    assert slope.high - slope.value == pytest.approx(12.7062 * (1 / 12) ** 0.5, rel=1e-4)


def test_a_factor_that_does_not_vary_is_left_out_and_named():
    law = ScalingLaw.fit(rows(batches=(8,)))
    assert law.names == ("parameters", "tokens")
    assert law.constant == {"batch": 8}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "0 rows have one value"),
        (rows()[:1], "1 rows have one value of parameters, tokens, batch each"),
        (rows()[:1] * 5, "a law needs drafts that differ"),
        (rows()[:3], "3 rows are too few: a law over tokens, batch with an interval needs 4"),
        ([Row({"parameters": n, "tokens": 20 * n}, 1.0) for n in (1, 2, 4, 8, 16)], "vary together in all rows"),
        ([Row({"parameters": n}, 1.0) for n in (0, 1, 2)], "parameters=0 of a draft is wrong"),
    ],
)
def test_rows_that_determine_no_law_are_refused_with_the_reason(given, words):
    with pytest.raises(UserError, match=words):
        ScalingLaw.fit(given)


def test_the_best_draft_grows_with_the_cost_of_the_target():
    law = ScalingLaw.fit(rows())

    def best(target_ms):
        costs = Costs(target_ms, target_ms, 5, per_million_ms=1.0)
        return max(choices(law, costs), key=lambda draft: draft.speed_up.value).factors["parameters"]

    assert best(1.0) < best(30.0) < best(1000.0)


def test_the_speed_up_is_tokens_of_a_pass_over_its_time():
    costs = Costs(target_ms=12.0, plain_ms=10.0, depth=4, per_million_ms=0.5)
    assert costs.speed_up(3.0, 1e6) == pytest.approx(3 * 10 / (12 + 4 * 0.5))
    assert costs.speed_up(9.0, 0) == pytest.approx(5 * 10 / 12), "a pass gives at most one token more than drafted"


def test_a_budget_trains_large_drafts_with_fewer_tokens_and_one_that_trains_none_is_refused():
    law, costs = ScalingLaw.fit(rows()), Costs(10.0, 10.0, 5, 0.1)
    found = choices(law, costs, budget_flops=6e11)
    assert all(6 * draft.factors["parameters"] * draft.factors["tokens"] <= 6e11 * 1.001 for draft in found)
    assert all(draft.factors["tokens"] >= 3e4 * 0.999 for draft in found)
    with pytest.raises(UserError, match="a budget of 1000 operations trains no draft"):
        choices(law, costs, budget_flops=1000.0)


def test_what_is_beyond_the_rows_is_said_to_be():
    law, costs = ScalingLaw.fit(rows()), Costs(10.0, 10.0, 5, 0.1)
    found = choices(law, costs, reach=4.0)
    assert found[len(found) // 2].measured
    assert not found[0].measured
    assert not found[-1].measured
