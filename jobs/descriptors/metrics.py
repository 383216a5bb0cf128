"""Metrics of report.json: their titles, units and directions.

A job's descriptor lists its metrics; those that several jobs report are defined here, once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MEBI = 2.0**20


@dataclass(frozen=True)
class Metric:
    """A metric of report.json. scale: size of one shown unit. better: minimize, maximize, or None for neither."""

    name: str
    title: str
    unit: str = ""
    better: str | None = "minimize"
    scale: float = 1.0

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def text(self, value: float) -> str:
        """A value with its unit."""
        text = texts([value / self.scale])[0]
        return f"{text}{'' if self.unit == '%' else ' '}{self.unit}".strip()


KL_DIVERGENCE = Metric("kl_divergence", "KL divergence", "nats a token")
PERPLEXITY = Metric("perplexity", "perplexity")
TOP1_AGREEMENT = Metric("top1_agreement", "same first token", "%", "maximize", 0.01)
BYTES = Metric("bytes", "size", "MiB", "minimize", _MEBI)
BITS_PER_WEIGHT = Metric("bits_per_weight", "bits a weight")
DRAFT_ACCEPTANCE_RATE = Metric("draft_acceptance_rate", "accepted of drafted", "%", "maximize", 0.01)
# Reported by every job; the last columns of a table.
PEAK_RSS_BYTES = Metric("peak_rss_bytes", "peak memory", "MiB", "minimize", _MEBI)
SECONDS = Metric("seconds", "time", "s")

# Comparable only within one original model, tokenizer and evaluation text.
QUALITY = (KL_DIVERGENCE.name, PERPLEXITY.name, TOP1_AGREEMENT.name)
# Of a checkpoint, in the order of a table's columns.
CHECKPOINT = (KL_DIVERGENCE, PERPLEXITY, TOP1_AGREEMENT, BYTES, BITS_PER_WEIGHT)


def texts(values: Sequence[float | None]) -> list[str]:
    """Numbers of a column with the same decimals: four digits of the smallest, unless the largest gets too long."""
    known = [abs(value) for value in values if value]
    decimals = 0
    if any(value != int(value) for value in known):
        for_smallest, for_largest = (3 - math.floor(math.log10(min(known)))), 6 - math.floor(math.log10(max(known)))
        decimals = max(0, min(6, for_smallest, for_largest))
    return [_text(value, decimals) for value in values]


def _text(value: float | None, decimals: int) -> str:
    if value is None:
        return "–"
    if value and abs(value) < 0.5 * 10.0**-decimals:
        return f"{value:.2g}"
    return f"{value:,.{decimals}f}"
