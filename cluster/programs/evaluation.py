"""Evaluation on a cluster: each process evaluates a part of the windows, and the sums are added."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from hasten.accel.evaluation.divergence import Sums, evaluate
from hasten.accel.evaluation.perplexity import Windows
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.cluster.actors.divided_model import Division
from hasten.cluster.actors.rank_evaluator import EvaluatorSpec, Measured
from hasten.cluster.programs.evaluation_groups import group_results
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.recovery import Batches
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes
from hasten.cluster.runtime.tasks import task_results


def measure(
    model: Path,
    original: Path | None,
    cut: Windows,
    workers: int = 2,
    needs: ActorResources | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    batch_option: str = "windows at once",
    instead: str = "a smaller evaluation.sequence_length, or fewer workers",
    division: Division | None = None,
) -> Measured:
    """Evaluate a model on all windows, against the original if one is given; inside a Ray session.

    A task whose process or node is lost is run again; a task that runs out of memory is run once more with half the
    batch. cut: the windows. needs: resources of each task, None is one CPU; a task computes with as many threads as it
    has CPUs. progress(done, total): called with numbers of tasks. batch_option: config key of the batch, for messages.
    instead: other ways to save memory, for messages. division: of each worker over the ranks of a group, which then
    shares its part of the windows; needs are those of a rank. None for tasks.
    """
    needs = needs or ActorResources()
    parts = min(workers, len(cut))
    batches = Batches(batch_option, batch, f"use {instead}")
    folders = str(model), str(original) if original else None

    def arguments(part: int) -> tuple[object, ...]:
        return (*folders, cut.part(part, parts), int(needs.cpus), dtype, batches.of(part), device)

    ended: Iterator[tuple[int, Measured]]
    if division is None:
        ended = task_results(_evaluate, arguments, parts, parts, needs, batches)
    else:
        ended = group_results(
            EvaluatorSpec(model, original, division, dtype, device, max(1, int(needs.cpus))),
            [cut.part(part, parts) for part in range(parts)],
            needs,
            batches,
        )
    results: dict[int, Measured] = {}
    for part, result in ended:
        results[part] = result
        if progress:
            progress(len(results), parts)
    # In the order of the windows, because the last bits of a sum depend on its order.
    ordered = [results[part] for part in range(parts)]
    return Measured(
        sum((result.sums for result in ordered), Sums()),
        sum(result.cpu_seconds for result in ordered),
        max(result.peak_rss_bytes for result in ordered),
    )


def check_weights(folders: Iterable[Path], workers: int, threads: int) -> None:
    """Raise UserError naming a tensor with NaN or Inf; `workers` processes share the reading.

    Runs inside a Ray session and writes nothing. For packed weights only scales are checked: codes cannot be NaN.
    """
    calls = [(str(folder), part, workers) for folder in folders for part in range(workers)]
    batches = Batches("tensors at once", 1, "use fewer workers")
    for _ in task_results(_check, calls.__getitem__, len(calls), workers, ActorResources(threads), batches):
        pass


def _check(folder: str, part: int, parts: int) -> None:
    checkpoint = Checkpoint(folder)
    for name in checkpoint.names[part::parts]:
        checkpoint.check(name)


def _evaluate(
    model: str, original: str | None, cut: Windows, threads: int, dtype: torch.dtype, batch: int, device: str
) -> Measured:
    before = cpu_seconds()
    torch.set_num_threads(threads)
    compared = Architecture(Checkpoint(original), dtype, device) if original else None
    sums = evaluate(Architecture(Checkpoint(model), dtype, device), cut, compared, batch)
    return Measured(sums, cpu_seconds() - before, peak_rss_bytes())
