"""Metrics of reports, as the jobs' descriptors list them, and which of them a table shows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hasten.jobs.descriptors.metrics import Metric
from hasten.jobs.descriptors.registry import metrics as listed

_GIBI = 2.0**30
QUALITY = ("kl_divergence", "perplexity", "top1_agreement")
# What a row says of itself, and no metric to compare rows by where there is any other.
_NOT_MAIN = "seconds"


def metric(name: str) -> Metric:
    """What is known of a metric; of one that is not known here its name."""
    return listed().get(name) or Metric(name, name.replace("_", " "), "", None)


def fitted(name: str, values: Iterable[float | None]) -> Metric:
    """The metric in a unit that suits the values: large sizes in GiB."""
    found = metric(name)
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return replace(found, unit="GiB", scale=_GIBI) if found.unit == "MiB" and largest >= 10 * _GIBI else found


def number(value: object) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def columns(objectives: Sequence[str], metrics: Sequence[dict[str, float | None]]) -> list[str]:
    """Metrics to show of rows, by name: the objectives, then the main ones; where none is known, the first six."""
    there = {name for row in metrics for name, value in row.items() if value is not None}
    main = [name for name in listed() if name in there and name != _NOT_MAIN]
    if not main:
        main = [name for name in dict.fromkeys(name for row in metrics for name in row) if name in there][:6]
    return list(dict.fromkeys([*objectives, *main]))
