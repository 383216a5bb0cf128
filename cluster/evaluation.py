"""Evaluation over the processes of a cluster: each takes some of the windows, and the sums add up."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel.evaluation.divergence import Sums
from accel.evaluation.perplexity import Windows
from cluster import recovery
from cluster.placement import grows, nodes, packs
from cluster.recovery import Batches, Pace, Wait

_LOG = logging.getLogger(__name__)
# How often it is looked whether tasks are late, and whether there is a place for them.
_SECONDS_BETWEEN_LOOKS = 0.5


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
    for part, found in _done(_evaluate, call, parts, parts, threads, gpus, batches):
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
    for _ in _done(_check, calls.__getitem__, len(calls), workers, threads, 0, batches):
        pass


@dataclass
class _Running:
    """A task at work: its number, the CPUs that it asked for, and since when."""

    number: int
    cpus: float
    started: float


def _done(
    function: Callable[..., Any],
    call: Callable[[int], tuple[Any, ...]],
    count: int,
    at_once: int,
    cpus: float,
    gpus: float,
    batches: Batches,
) -> Iterator[tuple[int, Any]]:
    """Number and result of so many tasks as they end, of which some run at once; call(number): the arguments.

    A task that is lost runs again, with no CPUs of its own where no node that is left has so many. One that takes too
    long also runs where another has ended: the first result counts.
    """
    import ray

    def send(number: int, asked: float) -> None:
        # Not tried again by Ray: it would do so without end where memory runs out.
        task: Any = ray.remote(function).options(
            num_cpus=asked,
            num_gpus=gpus,
            max_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(int(cpus))}},
        )
        running[task.remote(*call(number))] = _Running(number, asked, time.monotonic())

    running: dict[Any, _Running] = {}
    queue, left, pace, losses = deque(range(count)), set(range(count)), Pace(), 0
    known = recovery.node_ids()
    waiting: Wait | None = None
    while left:
        while queue and len(running) < at_once:
            send(queue.popleft(), cpus)
        ready, _ = ray.wait(list(running), timeout=_SECONDS_BETWEEN_LOOKS)
        for reference in ready:
            task = running.pop(reference)
            try:
                found = recovery.get(reference)
            except ray.exceptions.RayError as error:
                losses += 1
                if losses == recovery.ATTEMPTS:
                    raise
                alone = all(each.number != task.number for each in running.values())
                if recovery.is_out_of_memory(error):
                    # Another process that does the same may have the memory.
                    if alone:
                        batches.halve(task.number, "a task")
                elif recovery.is_loss(error):
                    _LOG.warning("lost a task (%s); starting it again", recovery.reason(error))
                else:
                    raise
                if alone:
                    send(task.number, task.cpus)
                continue
            losses = 0
            pace.note(time.monotonic() - task.started)
            left.remove(task.number)
            for other in [other for other, each in running.items() if each.number == task.number]:
                del running[other]
                ray.cancel(other, force=True)
            yield task.number, found
        if ready:
            continue
        there, now_known = nodes(), recovery.node_ids()
        known |= now_known
        # Before a loss a task that no node holds waits for one that the autoscaler is yet to add.
        final = known != now_known or not grows()
        for reference, task in list(running.items()) if final else ():
            if gpus and not packs(there, [{"GPU": gpus}]):
                waiting = waiting or Wait("a task")
                waiting.go_on(f"{gpus:g} GPU(s)")
            elif not packs(there, [{"CPU": task.cpus, "GPU": gpus}]):
                _LOG.warning("no node that is left has %g CPUs: a task shares those that there are", task.cpus)
                del running[reference]
                ray.cancel(reference, force=True)
                send(task.number, 0)
            else:
                waiting = None
        now = time.monotonic()
        numbers = [task.number for task in running.values()]
        for task in list(running.values()):
            # One that waits for a place would help nobody.
            bundles = [{"CPU": each.cpus, "GPU": gpus} for each in (*running.values(), task)]
            free = len(running) < at_once and packs(there, bundles)
            if free and numbers.count(task.number) == 1 and pace.is_late(now - task.started):
                _LOG.info("a task has been running for %.0f s: another process does the same", now - task.started)
                send(task.number, task.cpus)


def _check(folder: str, part: int, parts: int) -> None:
    from accel.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    for name in checkpoint.names[part::parts]:
        checkpoint.check(name)


def _evaluate(
    model: str, original: str | None, cut: Windows, threads: int, dtype: torch.dtype, batch: int, device: str
) -> Measured:
    from accel.evaluation.divergence import evaluate
    from accel.models.architecture import Architecture
    from accel.models.checkpoint import Checkpoint
    from cluster.resources import cpu_seconds, peak_rss_bytes

    before = cpu_seconds()
    torch.set_num_threads(threads)
    compared = Architecture(Checkpoint(original), dtype, device) if original else None
    sums = evaluate(Architecture(Checkpoint(model), dtype, device), cut, compared, batch)
    return Measured(sums, cpu_seconds() - before, peak_rss_bytes())
