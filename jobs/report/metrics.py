"""Metrics of reports, from the jobs' descriptors, and the choice of those that a table shows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hasten.jobs.descriptors.metrics import Metric
from hasten.jobs.descriptors.registry import metrics as listed

_GIBI = 2.0**30
# Shown for every row anyway, so no column of its own, unless it is the only metric.
_NOT_MAIN = "seconds"


def metric(name: str) -> Metric:
    """Title, unit and direction of a metric; a metric that no descriptor lists has its name as title."""
    return listed().get(name) or Metric(name, name.replace("_", " "), "", None)


def fitted(name: str, values: Iterable[float | None]) -> Metric:
    """The metric in a unit that suits the values: large sizes in GiB."""
    known = metric(name)
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return replace(known, unit="GiB", scale=_GIBI) if known.unit == "MiB" and largest >= 10 * _GIBI else known


def number(value: object) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def columns(objectives: Sequence[str], metrics: Sequence[dict[str, float | None]]) -> list[str]:
    """Names of the metrics to show: the objectives, then listed metrics; if rows have none, their first six."""
    present = {name for row in metrics for name, value in row.items() if value is not None}
    main = [name for name in listed() if name in present and name != _NOT_MAIN]
    if not main:
        main = [name for name in dict.fromkeys(name for row in metrics for name in row) if name in present][:6]
    return list(dict.fromkeys([*objectives, *main]))
