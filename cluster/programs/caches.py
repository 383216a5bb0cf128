"""Measurements of cache methods on a cluster: a task for each method and budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheBudget, CacheMethod
from hasten.accel.cache.measure import FullPredictions, measure
from hasten.accel.cache.statistics import load
from hasten.accel.evaluation.recall import Sample
from hasten.accel.models.loading_needs import register_loader
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.recovery import Batches
from hasten.cluster.runtime.resources import peak_rss_bytes
from hasten.cluster.runtime.tasks import task_results


@dataclass(frozen=True)
class CacheRow:
    """A row to measure. statistics: file of the method's calibrated ones; None takes them from the prompt."""

    method: CacheMethod
    budget: CacheBudget | None
    statistics: Path | None = None


@dataclass(frozen=True)
class ModelInputs:
    """The model whose caches are measured."""

    model: Path
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class CacheInputs(ModelInputs):
    """What all rows are measured on. windows: (N, T) of text or None. recall: samples by task."""

    windows: Tensor | None
    context: int
    recall: Mapping[str, Sequence[Sample]]


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
    session = uuid4().hex

    def arguments(number: int) -> tuple[object, ...]:
        return session, inputs, rows[number], int(needs.cpus)

    for number, result in task_results(_measure, arguments, len(rows), min(workers, len(rows)), needs, batches):
        done(number, result)


def load_reference(inputs: CacheInputs) -> tuple[Any, FullPredictions | None]:
    """The model, and its predictions with the full cache where text is measured."""
    model = load_model(inputs)
    return model, None if inputs.windows is None else FullPredictions(model, inputs.windows, inputs.context)


def load_model(inputs: ModelInputs) -> Any:
    """The model, compressed or not, ready to run."""
    # transformers takes seconds to import, and this module is imported by the driver.
    from transformers import AutoModelForCausalLM

    register_loader(inputs.model)
    model: Any = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=inputs.dtype)
    return model.to(inputs.device).eval()


# The model of this process's last task, and what it predicts with the full cache: Ray runs the next task of the same
# session in the same process.
_LAST: dict[str, tuple[Any, FullPredictions | None]] = {}


def _measure(session: str, inputs: CacheInputs, row: CacheRow, threads: int) -> dict[str, Any]:
    torch.set_num_threads(max(1, threads))
    if session not in _LAST:
        _LAST.clear()
        _LAST[session] = load_reference(inputs)
    model, reference = _LAST[session]
    statistics = None if row.statistics is None else load(row.method, row.statistics)
    found = measure(model, row.method, row.budget, reference, inputs.recall, statistics=statistics)
    return found | {"peak_rss_bytes": peak_rss_bytes()}
