"""Measurements of cache methods on a cluster: a task for each method and budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.measure import measure
from hasten.accel.evaluation.recall import Sample
from hasten.accel.models.loading_needs import register_loader
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.recovery import Batches
from hasten.cluster.runtime.resources import peak_rss_bytes
from hasten.cluster.runtime.tasks import task_results


@dataclass(frozen=True)
class CacheRow:
    """A row to measure."""

    method: CacheMethod
    budget: float | None


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
    register_loader(inputs.model)
    model: Any = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=inputs.dtype)
    model = model.to(inputs.device).eval()
    budget = None if row.budget is None else CacheBudget(row.budget)
    found = measure(model, row.method, budget, inputs.windows, inputs.context, inputs.recall)
    return found | {"peak_rss_bytes": peak_rss_bytes()}
