"""The calibration pass on a cluster: which calibrator does what, and what happens when one of them dies.

A block is the unit of work. Its statistics are collected on every shard, its groups of layers are solved by whichever
calibrator is free, and its shard is written by the driver. When a calibrator is lost, a new one takes over its chunks,
and what it was at is done again; nothing else is. A solve that takes too long is made by a free calibrator as well.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any

from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.settings import Settings, Task
from hasten.accel.compression.calibration.statistics import split
from hasten.accel.errors import UserError
from hasten.cluster.actors.calibrator import Calibrator
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import Crew, wait
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

_LOG = logging.getLogger(__name__)
# How often it is looked whether a solve is late.
_SECONDS_BETWEEN_LOOKS = 0.25
# Large temporaries go back to the system as soon as they are freed. By itself glibc raises the first bound to 32 MiB,
# and keeps hundreds of MB after a few blocks. The second keeps it from giving back small ones.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 24), "MALLOC_TRIM_THRESHOLD_": str(1 << 26)}


# Packed tensors by layer, and facts, of some groups of a block by their keys.
Solved = dict[tuple[str, ...], tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]]


@dataclass(frozen=True)
class _Call:
    """Groups that a calibrator solves, by their keys, what they cost together, and since when."""

    worker: int
    unit: tuple[str, ...]
    cost: float
    started: float


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
        self._crew = Crew("a calibrator", workers, settings.threads, gpus, self._start)
        # Promises of blocks' sums, one a calibrator, and the groups that they are of; and of the block at work those of
        # successors, in case that the sums of their predecessors went with them.
        self._sums: dict[int, list[Any]] = {}
        self._keys: dict[int, list[str]] = {}
        self._again: dict[int, Any] = {}
        self._block = -1
        # Solves whose result is there already from another calibrator, which are still at it.
        self._late: dict[Any, int] = {}
        self._pace = recovery.Pace()
        # Cost of the dearest unit that was solved: what is dearer may well take longer.
        self._dearest = 0.0
        self._batches = recovery.Batches(
            "calibration.batch",
            settings.batch,
            "use a smaller calibration.sequence_length, fewer calibration.sequences, or more workers on more nodes",
        )
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
        self._crew.begin()
        try:
            self._retry(self._check)
        except BaseException:
            self._end()
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
            self._end()
            output.release()
        return self.report

    def pause(self) -> None:
        """End the calibrators, which start again when they are needed: who waits holds nothing that others may need."""
        self._end()

    def _do_all(self, todo: list[int], progress: Callable[[int, dict[str, Any]], None] | None) -> None:
        self._crew.begin()
        # Start-up is no part of the pass.
        self._retry(lambda: self._all([worker.usage.remote() for worker in self._crew.actors]))
        started = perf_counter()
        for index, block in enumerate(todo):
            row = self._retry(partial(self._do, block, {}))
            self.report.blocks.append(row)
            if progress:
                progress(index + 1, row)
        self.report.seconds = perf_counter() - started

    def _start(self, index: int, cpus: float) -> Any:
        """A calibrator; one that succeeds another promises what that one had promised."""
        import ray

        actor: Any = (
            ray.remote(Calibrator)
            .options(
                num_cpus=cpus,
                num_gpus=self._gpus,
                max_restarts=0,  # a calibrator's state cannot be restarted by Ray; the pass makes a new one
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._settings.threads), **_ALLOCATOR}},
            )
            .remote(self._settings, self._chunks[index])
        )
        for block in sorted(self._sums):
            sums = actor.collect.remote(block, self._keys[block])
            if block == self._block:
                self._again[index] = sums
            else:
                self._sums[block][index] = sums
        return actor

    def _add_usage(self) -> None:
        """Enter what the calibrators used into the report."""
        for seconds, peak in recovery.answers([self._crew.actors[index].usage.remote() for index in self._crew.there]):
            self.report.cpu_seconds += seconds
            self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, peak)

    def _end(self) -> None:
        self._crew.end()
        self._sums, self._again, self._late = {}, {}, {}
        self.report.restarts = self._crew.restarts

    def _check(self) -> None:
        architecture = self._task.architecture
        names = [name for block in range(architecture.num_blocks) for name in architecture.block_tensors(block)]
        names += architecture.outer_tensors()
        count = len(self._crew.actors)
        self._all([worker.check.remote(names[index::count]) for index, worker in enumerate(self._crew.actors)])

    def _do(self, block: int, solved: Solved) -> dict[str, Any]:
        """Do a block, of which some groups may be solved; those that are stay there if this fails."""
        started = perf_counter()
        keys = {key for unit in solved for key in unit}
        groups = [group for group in self._task.output.unfinished(block) if group.key not in keys]
        self._block = block
        if self._settings.needs_hessian and groups:
            self._collect(block, groups)
        self._solve(block, groups, solved)
        # The store may give the room of these sums to the next block's.
        self._sums.pop(block, None)
        self._again.clear()
        packed = {name: tensors for found, _ in solved.values() for name, tensors in found.items()}
        facts = [row for _, rows in solved.values() for row in rows]
        order = [layer.name for group in self._task.layer_groups[block] for layer in group.layers]
        facts.sort(key=lambda row: order.index(row["layer"]))
        for row in facts:
            for note in row["notes"]:
                _LOG.warning("%s: %s", row["layer"], note)
        self._task.output.write_block(block, packed, facts)
        del packed
        solved.clear()
        release_memory()
        errors = [row["error"] for row in facts]
        return {
            "block": block,
            "seconds": perf_counter() - started,
            "error": sum(errors) / len(errors) if errors else 0.0,
            "layers": len(facts),
        }

    def _collect(self, block: int, groups: list[Group]) -> None:
        """Ask for sums of a block's groups, which are bound to their chunks: no other calibrator can help a slow one.

        Where the original's outputs are propagated nothing that is solved here matters to the next block to be solved,
        which is asked for at once: no calibrator waits for another's solve.
        """
        wanted = {block: groups}
        if self._settings.propagate == "original":
            later = range(block + 1, len(self._task.layer_groups))
            found = ((other, self._task.output.unfinished(other)) for other in later)
            wanted |= dict(islice(((other, left) for other, left in found if left), 1))
        for each, left in wanted.items():
            if each not in self._sums:
                # The same for all shards, whenever each of them comes to it.
                keys = [group.key for group in left]
                self._keys[each] = keys
                self._sums[each] = [worker.collect.remote(each, keys) for worker in self._crew.actors]

    def _solve(self, block: int, groups: list[Group], solved: Solved) -> None:
        """Hand out groups, the dearest first, to whichever calibrator is free, and enter what comes back.

        Two that solve the same find the same bits, and what they write has a name for each until it is whole.
        """
        import ray

        waiting = deque(tuple(keys) for keys in self._units(groups))
        left = set(waiting)
        costs = {group.key: group.cost for group in groups}
        running: dict[Any, _Call] = {}
        losses = 0
        try:
            while left:
                busy = {call.worker for call in running.values()} | set(self._late.values())
                free = [worker for worker in self._crew.there if worker not in busy]
                for worker in free:
                    unit = waiting.popleft() if waiting else self._late_unit(running)
                    if unit is None:
                        break
                    solve = self._crew.actors[worker].solve.remote
                    reference = solve(block, list(unit), *self._sums.get(block, []))
                    running[reference] = _Call(worker, unit, sum(costs[key] for key in unit), perf_counter())
                seconds = _SECONDS_BETWEEN_LOOKS if free and not waiting else None
                for reference in wait([self._crew], [*running, *self._late], seconds):
                    if self._late.pop(reference, None) is not None:
                        continue
                    call = running.pop(reference)
                    try:
                        tensors, rows, _ = recovery.get(reference)
                    except ray.exceptions.RayError as error:
                        losses += 1
                        if recovery.is_out_of_memory(error) or not recovery.is_actors_own(error):
                            raise
                        if not recovery.is_loss(error) or losses == recovery.ATTEMPTS:
                            raise
                        if all(other.unit != call.unit for other in running.values()):
                            waiting.appendleft(call.unit)
                        self._crew.replace(call.worker, error)
                        continue
                    losses = 0
                    self._pace.note(perf_counter() - call.started)
                    self._dearest = max(self._dearest, call.cost)
                    solved[call.unit] = tensors, rows
                    left.remove(call.unit)
                    self._outrun(running, call.unit)
        finally:
            # Whatever went wrong, these calibrators are not free before they are through.
            self._outrun(running)

    def _late_unit(self, running: dict[Any, _Call]) -> tuple[str, ...] | None:
        """Of the units that one calibrator has been solving for too long, the one that takes longest."""
        now = perf_counter()
        units = [call.unit for call in running.values()]
        late = [call for call in running.values() if self._pace.is_late(now - call.started)]
        alone = [call for call in late if units.count(call.unit) == 1 and call.cost <= self._dearest]
        if not alone:
            return None
        first = min(alone, key=lambda call: call.started)
        _LOG.info("a calibrator has been solving for %.0f s: another does the same", now - first.started)
        return first.unit

    def _outrun(self, running: dict[Any, _Call], unit: tuple[str, ...] | None = None) -> None:
        """Nobody waits any more for the other solves of a unit, None for all."""
        for reference, call in list(running.items()):
            if unit is None or call.unit == unit:
                self._late[reference] = running.pop(reference).worker

    def _units(self, groups: list[Group]) -> list[list[str]]:
        """Keys of groups to be solved in one call: many small ones, such as experts, share the cost of a call."""
        ordered = sorted(groups, key=lambda group: (-group.cost, group.key))
        enough = sum(group.cost for group in ordered) / (8 * len(self._chunks))
        units: list[list[str]] = []
        size = enough
        for group in ordered:
            if size >= enough:
                units.append([])
                size = 0.0
            units[-1].append(group.key)
            size += group.cost
        return units

    def _all(self, references: list[Any]) -> None:
        """Wait for calls of all calibrators; a user's mistake that one found is raised as it was there."""
        left = list(references)
        while left:
            for reference in wait([self._crew], left):
                recovery.get(reference)
                left.remove(reference)

    def _retry(self, work: Callable[[], Any]) -> Any:
        """Do work; after the loss of a calibrator do the work again with its successor."""
        import ray

        for attempt in range(1, recovery.ATTEMPTS + 1):
            # Chunks are bound to calibrators: work needs all of them.
            self._crew.fill()
            try:
                return work()
            except ray.exceptions.RayError as error:
                recovery.raise_if_refused(error)
                if attempt == recovery.ATTEMPTS:
                    raise
                if recovery.is_out_of_memory(error):
                    self._halve()
                elif recovery.is_loss(error):
                    self._recover()
                else:
                    raise
        raise AssertionError("unreachable")

    def _recover(self) -> None:
        """Successors for those that are lost, and for what went with them."""
        for index, error in self._crew.lost().items():
            self._crew.replace(index, error)
        self._crew.fill()
        if self._again and self._block in self._sums:
            for index, sums in self._again.items():
                self._sums[self._block][index] = sums
            self._again.clear()
        else:
            # Whose sums they were that are gone nobody knows.
            self._sums.clear()

    def _halve(self) -> None:
        """Start all anew with half the batch: those that share a node ran out of memory together."""
        self._batches.halve(0, "a calibrator")
        self._settings = replace(self._settings, batch=self._batches.of(0))
        self._sums.clear()
        self._again.clear()
        for index in self._crew.there:
            self._crew.replace(index)
