"""Options of `hasten JOB --multirun`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import ADDRESS, option

PREFIX = "sweep."


@dataclass
class SweepConfig:
    """How the points of `hasten JOB --multirun` are chosen and run; on the command line each has `sweep.` before it."""

    sampler: str = option(
        "auto",
        "how points are chosen: grid takes all, the others are Optuna's; auto is grid where every option has a list, "
        "else tpe, or nsgaii for several metrics",
        choices=("auto", "grid", "tpe", "nsgaii", "random"),
    )
    trials: int = option(20, "points that Optuna chooses", at_least=1)
    metrics: list[str] = option([], "metrics that Optuna optimises and tables show first, names as in report.json")
    directions: list[str] = option([], "minimize or maximize, for each of metrics; [] is what is usual for each")
    at_once: int | None = option(None, "points that run at the same time at most; null is as many as fit", at_least=1)
    retries: int = option(3, "times that a point starts again after its process or node died", at_least=0)
    seed: int = option(0, "seed of Optuna's sampler", at_least=0)
    address: str | None = option(None, f"{ADDRESS}; for all points, whose own addresses do not count")
    cpus: int | None = option(
        None,
        "CPUs that a Ray started for the sweep offers, more or fewer than there are; null is what the machine has",
        at_least=1,
    )
