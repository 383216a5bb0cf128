"""Objectives of a sweep: the default metrics and directions, and the errors for missing ones."""

import pytest

from hasten.accel.errors import UserError
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.sweep.objectives import Objectives, objectives, sampler
from hasten.jobs.sweep.options import SweepConfig


@pytest.mark.parametrize(
    ("job", "metrics", "directions", "shown"),
    [
        ("compress", ("kl_divergence",), ("minimize",), ("kl_divergence", "bytes")),
        ("search", ("kl_divergence",), ("minimize",), ("kl_divergence", "bytes")),
        (
            "decode",
            ("tokens_per_second",),
            ("maximize",),
            ("tokens_per_second", "mean_acceptance_length"),
        ),
        ("pretrain", (), (), ()),
    ],
)
def test_each_job_has_its_default_objectives(job, metrics, directions, shown):
    assert objectives(jobs()[job], SweepConfig(), searches=False) == Objectives(metrics, directions, shown)


def test_named_metrics_come_first_each_in_its_usual_direction():
    found = objectives(
        jobs()["compress"], SweepConfig(metrics=["bytes", "top1_agreement", "arc.accuracy"]), searches=True
    )
    assert found.directions == ("minimize", "maximize", "maximize")
    assert found.shown == ("bytes", "top1_agreement", "arc.accuracy", "kl_divergence")
    assert found.plain[1] == {"metric": "top1_agreement", "direction": "maximize"}


def test_directions_that_are_given_count():
    found = objectives(jobs()["compress"], SweepConfig(metrics=["bytes"], directions=["maximize"]), searches=True)
    assert found.directions == ("maximize",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SweepConfig(), "sweep.metrics is needed: name a metric of bench's report.json"),
        (
            SweepConfig(metrics=["a"], directions=["minimize"] * 2),
            "sweep.directions has 2 entries and sweep.metrics 1: give one each",
        ),
        (
            SweepConfig(metrics=["a"], directions=["down"]),
            "sweep.directions=down is wrong: expected minimize or maximize",
        ),
    ],
)
def test_settings_that_cannot_be_optimized_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        objectives(jobs()["bench"], settings, searches=True)


def test_values_come_in_the_order_of_the_metrics():
    found = objectives(jobs()["compress"], SweepConfig(metrics=["bytes", "kl_divergence"]), searches=True)
    assert found.values({"kl_divergence": 0.5, "other": None, "bytes": 12}) == [12.0, 0.5]


@pytest.mark.parametrize("there", [{}, {"kl_divergence": None}, {"kl_divergence": [0.1]}])
def test_a_metric_that_a_report_lacks_is_named_with_those_that_it_has(there):
    found = objectives(jobs()["compress"], SweepConfig(), searches=True)
    with pytest.raises(UserError, match=r"the report has no number for kl_divergence; it has bytes, seconds$"):
        found.values({**there, "seconds": 1.5, "bytes": 3, "name": "x"})


@pytest.mark.parametrize(
    ("settings", "is_discrete", "expected"),
    [
        (SweepConfig(), True, "grid"),
        (SweepConfig(), False, "tpe"),
        (SweepConfig(metrics=["a", "b"]), False, "nsgaii"),
        (SweepConfig(sampler="random"), True, "random"),
        (SweepConfig(sampler="tpe"), True, "tpe"),
    ],
)
def test_auto_counts_lists_and_lets_optuna_choose_between_bounds(settings, is_discrete, expected):
    assert sampler(settings, is_discrete) == expected


def test_a_grid_of_intervals_is_refused():
    with pytest.raises(UserError, match=r"sweep\.sampler=grid needs a list of values for every option"):
        sampler(SweepConfig(sampler="grid"), is_discrete=False)
