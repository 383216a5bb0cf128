"""The calibration pass on a cluster: which calibrator does what, and what happens when one of them dies.

A block is the unit of work. Its statistics are collected on every shard, its groups of layers are solved by whichever
calibrator is free, and its shard is written by the driver. When a calibrator is lost, a new one takes over its chunks
and the block is done again; nothing else is.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from accel.compression.plan import Group
from accel.compression.settings import Settings, Task
from accel.compression.statistics import split
from accel.errors import UserError
from cluster.calibrator import Calibrator
from cluster.resources import cpu_seconds, peak_rss_bytes, release_memory

_LOG = logging.getLogger(__name__)
# A block that failed so often fails for a reason of its own.
_ATTEMPTS = 10
# Large temporaries go back to the system as soon as they are freed. By itself glibc raises the first bound to 32 MiB,
# and keeps hundreds of MB after a few blocks. The second keeps it from giving back small ones.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 24), "MALLOC_TRIM_THRESHOLD_": str(1 << 26)}


@dataclass
class PassReport:
    """What a pass cost. seconds: wall time of the blocks done in this run; cpu_seconds: of all processes together.

    blocks: one row for every block done in this run. resumed: blocks that were finished before.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0
    resumed: int = 0
    restarts: int = 0
    blocks: list[dict[str, Any]] = field(default_factory=list)


class CalibrationPass:
    """Drives one compression; `tokens` [sequences, T] are None where the quantizer needs no statistics.

    cpus and gpus are what each calibrator asks the cluster for.
    """

    def __init__(self, settings: Settings, tokens: Tensor | None, workers: int, gpus: float = 0) -> None:
        self._settings = settings
        self._task = Task(settings)
        self._gpus = gpus
        chunks = {} if tokens is None else dict(enumerate(tokens.tensor_split(min(settings.shards, len(tokens)))))
        if tokens is not None and workers > len(chunks):
            raise UserError(
                f"workers={workers} is more than the {len(chunks)} chunks of the calibration sequences: "
                f"use workers={len(chunks)}, or more calibration.shards"
            )
        self._chunks: list[dict[int, Tensor]] = (
            [{number: chunks[number] for number in part} for part in split(len(chunks), workers)]
            if chunks
            else [{} for _ in range(workers)]
        )
        self._workers: list[Any] = []
        self._ahead: dict[int, list[Any]] = {}
        self.report = PassReport()

    @property
    def task(self) -> Task:
        """The driver's own view of checkpoint, plan and output."""
        return self._task

    def check_weights(self) -> None:
        """Raise UserError naming a tensor that has NaN or Inf; starts the calibrators, which read all of them.

        Writes nothing, so that a damaged checkpoint leaves nothing behind.
        """
        before = cpu_seconds()
        self._start_all()
        try:
            self._retry(self._check)
        except BaseException:
            self._kill_all()
            raise
        self.report.cpu_seconds += cpu_seconds() - before

    def run(self, progress: Callable[[int, dict[str, Any]], None] | None = None) -> PassReport:
        """Do every block that is not finished, then write index and config; progress(block, facts) after each block."""
        output, before = self._task.output, cpu_seconds()
        finished = output.finished
        self.report.resumed = len(finished)
        todo = [block for block in range(self._task.architecture.num_blocks) if block not in finished]
        try:
            if todo:
                self._do_all(todo, progress)
            if not output.is_complete:
                output.finish()
            self.report.cpu_seconds += cpu_seconds() - before
            self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, peak_rss_bytes())
            self._add_usage()
        finally:
            self._kill_all()
        return self.report

    def _do_all(self, todo: list[int], progress: Callable[[int, dict[str, Any]], None] | None) -> None:
        self._start_all()
        # Start-up is no part of the pass.
        self._retry(lambda: self._get([worker.usage.remote() for worker in self._workers]))
        started = perf_counter()
        for index, block in enumerate(todo):
            row = self._retry(partial(self._do, block), f"block {block}")
            self.report.blocks.append(row)
            if progress:
                progress(index + 1, row)
        self.report.seconds = perf_counter() - started

    def _start_all(self) -> None:
        self._workers = self._workers or [self._start(chunks) for chunks in self._chunks]

    def _start(self, chunks: dict[int, Tensor]) -> Any:
        import ray

        actor = ray.remote(Calibrator).options(
            num_cpus=self._settings.threads,
            num_gpus=self._gpus,
            max_restarts=0,  # a calibrator's state cannot be restarted by Ray; the pass makes a new one
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._settings.threads), **_ALLOCATOR}},
        )
        return actor.remote(self._settings, chunks)

    def _add_usage(self) -> None:
        """Enter what the calibrators used into the report."""
        import ray

        try:
            usages = ray.get([worker.usage.remote() for worker in self._workers])
        except ray.exceptions.RayError:
            usages = []
        for seconds, peak in usages:
            self.report.cpu_seconds += seconds
            self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, peak)

    def _kill_all(self) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def _check(self) -> None:
        architecture = self._task.architecture
        names = [name for block in range(architecture.num_blocks) for name in architecture.block_tensors(block)]
        names += architecture.outer_tensors()
        count = len(self._workers)
        self._get([worker.check.remote(names[index::count]) for index, worker in enumerate(self._workers)])

    def _do(self, block: int) -> dict[str, Any]:
        started = perf_counter()
        needed = self._settings.needs_second_moment
        groups = self._task.output.unfinished(block)
        collected = self._collect(block) if needed and groups else []
        packed, facts = self._solve(block, groups, collected)
        # The store may give the room of these sums to the next block's.
        del collected
        order = [layer.name for group in groups for layer in group.layers]
        facts.sort(key=lambda row: order.index(row["layer"]))
        for row in facts:
            for note in row["notes"]:
                _LOG.warning("%s: %s", row["layer"], note)
        self._task.output.write_block(block, packed, facts)
        del packed
        release_memory()
        errors = [row["error"] for row in facts]
        return {
            "block": block,
            "seconds": perf_counter() - started,
            "error": sum(errors) / len(errors) if errors else 0.0,
            "layers": len(facts),
        }

    def _collect(self, block: int) -> list[Any]:
        """Promises of a block's sums, one a calibrator.

        Where the original's outputs are propagated nothing that is solved here matters to the next block to be solved,
        which is asked for at once: no calibrator waits for another's solve.
        """
        collected = self._ahead.pop(block, None) or [worker.collect.remote(block) for worker in self._workers]
        if self._settings.propagate == "original":
            later = range(block + 1, len(self._task.plan))
            following = next((other for other in later if self._task.output.unfinished(other)), None)
            if following is not None:
                self._ahead[following] = [worker.collect.remote(following) for worker in self._workers]
        return collected

    def _solve(
        self, block: int, groups: list[Group], collected: list[Any]
    ) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
        """Hand out groups, the dearest first, to whichever calibrator is free."""
        import ray

        waiting = self._units(groups)
        free = list(self._workers)
        running: dict[Any, Any] = {}
        packed: dict[str, dict[str, Tensor]] = {}
        facts: list[dict[str, Any]] = []
        while waiting or running:
            while waiting and free:
                worker = free.pop(0)
                running[worker.solve.remote(block, waiting.pop(0), *collected)] = worker
            (done, *_), _ = ray.wait(list(running))
            free.append(running.pop(done))
            tensors, rows, _ = self._get([done])[0]
            packed |= tensors
            facts += rows
        return packed, facts

    def _units(self, groups: list[Group]) -> list[list[str]]:
        """Keys of groups to be solved in one call: many small ones, such as experts, share the cost of a call."""
        ordered = sorted(groups, key=lambda group: (-group.cost, group.key))
        enough = sum(group.cost for group in ordered) / (8 * len(self._workers))
        units: list[list[str]] = []
        size = enough
        for group in ordered:
            if size >= enough:
                units.append([])
                size = 0.0
            units[-1].append(group.key)
            size += group.cost
        return units

    @staticmethod
    def _get(refs: list[Any]) -> list[Any]:
        """Results of calls; a user's mistake that an actor found is raised as it was there."""
        import ray

        try:
            results: list[Any] = ray.get(refs)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        return results

    def _retry(self, work: Callable[[], Any], what: str = "start") -> Any:
        """Do work; after the loss of a calibrator replace it and do the work again."""
        import ray

        lost = (
            ray.exceptions.RayActorError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
        )
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return work()
            except lost as error:
                _raise_if_refused(error)
                if attempt == _ATTEMPTS:
                    raise
                reason = str(error).strip().splitlines()[0]
                _LOG.warning("%s: lost a calibrator (%s); starting another and doing it again", what, reason)
                self._replace_lost()
        raise AssertionError("unreachable")

    def _replace_lost(self) -> None:
        import ray

        self._ahead.clear()
        for index, worker in enumerate(self._workers):
            try:
                ray.get(worker.usage.remote())
            except ray.exceptions.RayError:
                ray.kill(worker)
                self._workers[index] = self._start(self._chunks[index])
                self.report.restarts += 1


def _raise_if_refused(error: Exception) -> None:
    """Raise what a calibrator raised while it was made, which another one would raise as well."""
    if getattr(error, "actor_init_failed", False):
        # Ray keeps no more of the exception than its text.
        name, _, message = str(error).strip().rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
        if name:
            raise UserError(message) from None
        raise error
