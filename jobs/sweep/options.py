"""Options of `hasten JOB --multirun`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import ADDRESS, option

PREFIX = "sweep."


@dataclass
class SweepConfig:
    """How the points of `hasten JOB --multirun` are chosen and run; on the command line each has `sweep.` before it."""

    sampler: str = option(
        "auto",
        "how points are chosen: grid runs all, the others are Optuna's samplers; auto is grid if every option has a "
        "list of values, else tpe, or nsgaii for several metrics",
        choices=("auto", "grid", "tpe", "nsgaii", "random"),
    )
    trials: int = option(20, "points that Optuna chooses", at_least=1)
    metrics: list[str] = option([], "metrics that Optuna optimizes and tables show first, named as in report.json")
    directions: list[str] = option([], "minimize or maximize, for each of metrics; [] is the usual direction of each")
    at_once: int | None = option(None, "maximum points that run at the same time; null is as many as fit", at_least=1)
    retries: int = option(3, "restarts of a point after its process or node died", at_least=0)
    seed: int = option(0, "seed of Optuna's sampler", at_least=0)
    address: str | None = option(None, f"{ADDRESS}; it holds for all points")
    cpus: int | None = option(
        None,
        "CPUs of the Ray cluster that the sweep starts, which need not be the machine's; null is the machine's",
        at_least=1,
    )
