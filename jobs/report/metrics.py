"""Metrics of reports: what they are called, in which unit they are shown, and which way is better."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_MEBI, _GIBI = 2.0**20, 2.0**30


@dataclass(frozen=True)
class Metric:
    """A figure of report.json. scale: what one unit is. better: minimize, maximize, or None where neither is."""

    name: str
    title: str
    unit: str = ""
    better: str | None = "minimize"
    scale: float = 1.0

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def told(self, value: float) -> str:
        """A single value in a sentence."""
        text = texts([value / self.scale])[0]
        return f"{text}{'' if self.unit == '%' else ' '}{self.unit}".strip()


QUALITY = ("kl_divergence", "perplexity", "top1_agreement")
# In the order of a table's columns.
_KNOWN = {
    metric.name: metric
    for metric in (
        Metric("kl_divergence", "KL divergence", "nats a token"),
        Metric("perplexity", "perplexity"),
        Metric("top1_agreement", "same first token", "%", "maximize", 0.01),
        Metric("bytes", "size", "MiB", "minimize", _MEBI),
        Metric("bits_per_weight", "bits a weight"),
        Metric("budget_bits_per_weight", "bits of the budget used"),
        Metric("tokens_per_second", "tokens a second", "", "maximize"),
        Metric("mean_acceptance_length", "tokens a pass", "", "maximize"),
        Metric("draft_acceptance_rate", "accepted of drafted", "%", "maximize", 0.01),
        Metric("target_efficiency", "target efficiency", "", "maximize"),
        Metric("tokens_per_step", "tokens a step", "", "maximize"),
        Metric("drafted_per_step", "drafted a step", "", None),
        Metric("peak_rss_bytes", "peak memory", "MiB", "minimize", _MEBI),
        Metric("seconds", "time", "s"),
    )
}
_MAIN = [name for name in _KNOWN if name != "seconds"]


def metric(name: str) -> Metric:
    """What is known of a metric; of one that is not known here its name."""
    return _KNOWN.get(name) or Metric(name, name.replace("_", " "), "", None)


def fitted(name: str, values: Iterable[float | None]) -> Metric:
    """The metric in a unit that suits the values: large sizes in GiB."""
    found = metric(name)
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return replace(found, unit="GiB", scale=_GIBI) if found.unit == "MiB" and largest >= 10 * _GIBI else found


def number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def columns(objectives: Sequence[str], metrics: Sequence[dict[str, float | None]]) -> list[str]:
    """Metrics to show of rows, by name: the objectives, then the main ones; where none is known, the first six."""
    there = {name for row in metrics for name, value in row.items() if value is not None}
    main = [name for name in _MAIN if name in there]
    if not main:
        main = [name for name in dict.fromkeys(name for row in metrics for name in row) if name in there][:6]
    return list(dict.fromkeys([*objectives, *main]))


def texts(values: Sequence[float | None]) -> list[str]:
    """Numbers of one column with the same decimals: four digits of the smallest, as far as the largest allows it."""
    known = [abs(value) for value in values if value]
    decimals = 0
    if any(value != int(value) for value in known):
        wanted, most = (3 - math.floor(math.log10(min(known)))), 6 - math.floor(math.log10(max(known)))
        decimals = max(0, min(6, wanted, most))
    return [_text(value, decimals) for value in values]


def _text(value: float | None, decimals: int) -> str:
    if value is None:
        return "–"
    if value and abs(value) < 0.5 * 10.0**-decimals:
        return f"{value:.2g}"
    return f"{value:,.{decimals}f}"
