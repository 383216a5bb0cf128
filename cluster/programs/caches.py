"""Measurements of cache methods on a cluster: a task for each method and budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.measure import measure
from hasten.accel.cache.statistics import load
from hasten.accel.evaluation.recall import Sample
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.recovery import Batches
from hasten.cluster.runtime.resources import peak_rss_bytes
from hasten.cluster.runtime.tasks import task_results


@dataclass(frozen=True)
class CacheRow:
    """A row to measure. statistics: file of the method's calibrated ones; None takes them from the prompt."""

    method: CacheMethod
    budget: float | None
    statistics: Path | None = None


@dataclass(frozen=True)
class CacheInputs:
    """What all rows are measured on. windows: (N, T) of text or None. recall: samples by task."""

    model: Path
    windows: Tensor | None
    context: int
    recall: Mapping[str, Sequence[Sample]]
    dtype: torch.dtype
    device: str


def measure_caches(
    inputs: CacheInputs,
    rows: Sequence[CacheRow],
    workers: int,
    needs: ActorResources,
    done: Callable[[int, dict[str, Any]], None],
) -> None:
    """Measure rows, `workers` of them at a time; done(number, result) is called as each ends. Inside a Ray session.

    A row whose process or node is lost is measured again.
    """
    batches = Batches("sequences at once", 1, "use a smaller context, or fewer workers")

    def arguments(number: int) -> tuple[object, ...]:
        return inputs, rows[number], int(needs.cpus)

    for number, result in task_results(_measure, arguments, len(rows), min(workers, len(rows)), needs, batches):
        done(number, result)


def _measure(inputs: CacheInputs, row: CacheRow, threads: int) -> dict[str, Any]:
    # transformers takes seconds to import, and this module is imported by the driver.
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(max(1, threads))
    if Checkpoint(inputs.model).is_compressed:
        import hasten.accel.models.transformers_loader  # noqa: F401
    model: Any = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=inputs.dtype)
    model = model.to(inputs.device).eval()
    budget = None if row.budget is None else CacheBudget(row.budget)
    statistics = None if row.statistics is None else load(row.method, row.statistics)
    found = measure(model, row.method, budget, inputs.windows, inputs.context, inputs.recall, statistics=statistics)
    return found | {"peak_rss_bytes": peak_rss_bytes()}
