"""Objectives of a sweep: metrics of its points' reports, each with a direction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.accel.errors import UserError
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.registry import metrics as known_metrics
from hasten.jobs.sweep.options import SweepConfig

DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class Objectives:
    """metrics: optimized metrics. directions: of each, minimize or maximize. shown: metrics in tables, these first."""

    metrics: tuple[str, ...]
    directions: tuple[str, ...]
    shown: tuple[str, ...]

    def values(self, metrics: Mapping[str, Any]) -> list[float]:
        """Values of the optimized metrics in a finished point's report; UserError if one is missing."""
        missing = [name for name in self.metrics if not isinstance(metrics.get(name), int | float)]
        if missing:
            known = sorted(name for name, value in metrics.items() if isinstance(value, int | float))
            raise UserError(
                f"sweep.metrics: the report has no number for {', '.join(missing)}; it has {', '.join(known)}"
            )
        return [float(metrics[name]) for name in self.metrics]

    @property
    def plain(self) -> list[dict[str, str]]:
        """Metrics and directions as JSON values, for the sweep's report."""
        pairs = zip(self.metrics, self.directions, strict=True)
        return [{"metric": metric, "direction": direction} for metric, direction in pairs]


def objectives(job: Job, settings: SweepConfig, searches: bool) -> Objectives:
    """Objectives from the sweep's options, else the job's; searches: Optuna chooses points and needs a metric."""
    usual = job.objectives
    metrics = tuple(settings.metrics) or usual[:1]
    if searches and not metrics:
        raise UserError(f"sweep.metrics is needed: name a metric of {job.name}'s report.json to optimize")
    directions = tuple(settings.directions) or tuple(_usual_direction(metric) for metric in metrics)
    if len(directions) != len(metrics):
        raise UserError(
            f"sweep.directions has {len(directions)} entries and sweep.metrics {len(metrics)}: give one each"
        )
    for direction in directions:
        if direction not in DIRECTIONS:
            raise UserError(f"sweep.directions={direction} is wrong: expected {' or '.join(DIRECTIONS)}")
    return Objectives(metrics, directions, tuple(dict.fromkeys([*metrics, *usual])))


def _usual_direction(metric: str) -> str:
    """Direction in the jobs' descriptors, for TASK.METRIC by its last part; minimize for a metric not listed there."""
    known = known_metrics().get(metric.rpartition(".")[2])
    return "minimize" if known is None or known.better is None else known.better


def sampler(settings: SweepConfig, is_discrete: bool) -> str:
    """The sampler of the options, with `auto` resolved; UserError for a grid of infinitely many points."""
    if settings.sampler == "grid" and not is_discrete:
        raise UserError(
            "sweep.sampler=grid needs a list of values for every option: an interval has infinitely many points"
        )
    if settings.sampler != "auto":
        return settings.sampler
    if is_discrete:
        return "grid"
    return "nsgaii" if len(settings.metrics) > 1 else "tpe"
