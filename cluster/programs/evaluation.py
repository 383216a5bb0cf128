"""Evaluation over the processes of a cluster: each takes some of the windows, and the sums add up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.accel.evaluation.divergence import Sums
from hasten.accel.evaluation.perplexity import Windows
from hasten.cluster.runtime.recovery import Batches
from hasten.cluster.runtime.tasks import Tasks


@dataclass(frozen=True)
class Measured:
    """Sums over all windows, CPU seconds of all processes, and the largest peak of memory of one of them, in bytes."""

    sums: Sums
    cpu_seconds: float
    peak_rss_bytes: int


def measure(
    model: Path,
    original: Path | None,
    cut: Windows,
    workers: int = 2,
    threads: int = 1,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    device: str = "cpu",
    gpus: float = 0,
    progress: Callable[[int, int], None] | None = None,
    batch_option: str = "windows at once",
    instead: str = "a smaller evaluation.sequence_length, or fewer workers",
) -> Measured:
    """Evaluate a model on all windows, against the original where one is given; progress(done, total) in parts.

    Runs inside a Ray session. A task whose process or node dies runs again, and one that runs out of memory once more
    with half the batch. batch_option: the option that the batch comes from, instead: others that save memory.
    """
    parts = min(workers, len(cut))
    batches = Batches(batch_option, batch, f"use {instead}")
    folders = str(model), str(original) if original else None

    def call(part: int) -> tuple[Any, ...]:
        return (*folders, cut.part(part, parts), threads, dtype, batches.of(part), device)

    results: dict[int, Measured] = {}
    for part, found in Tasks(_evaluate, call, parts, parts, threads, gpus, batches).results():
        results[part] = found
        if progress:
            progress(len(results), parts)
    # In the order of the windows: a sum's last bits depend on its order.
    parted = [results[part] for part in range(parts)]
    return Measured(
        sum((part.sums for part in parted), Sums()),
        sum(part.cpu_seconds for part in parted),
        max(part.peak_rss_bytes for part in parted),
    )


def check_weights(folders: Iterable[Path], workers: int, threads: int) -> None:
    """UserError naming a tensor that holds NaN or Inf; `workers` processes share the reading.

    Runs inside a Ray session and writes nothing. Of packed weights the scales are looked at: codes cannot hold NaN.
    """
    calls = [(str(folder), part, workers) for folder in folders for part in range(workers)]
    batches = Batches("tensors at once", 1, "use fewer workers")
    for _ in Tasks(_check, calls.__getitem__, len(calls), workers, threads, 0, batches).results():
        pass


def _check(folder: str, part: int, parts: int) -> None:
    from hasten.accel.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    for name in checkpoint.names[part::parts]:
        checkpoint.check(name)


def _evaluate(
    model: str, original: str | None, cut: Windows, threads: int, dtype: torch.dtype, batch: int, device: str
) -> Measured:
    from hasten.accel.evaluation.divergence import evaluate
    from hasten.accel.models.architecture import Architecture
    from hasten.accel.models.checkpoint import Checkpoint
    from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes

    before = cpu_seconds()
    torch.set_num_threads(threads)
    compared = Architecture(Checkpoint(original), dtype, device) if original else None
    sums = evaluate(Architecture(Checkpoint(model), dtype, device), cut, compared, batch)
    return Measured(sums, cpu_seconds() - before, peak_rss_bytes())
