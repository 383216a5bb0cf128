"""Ray tasks that give their results however often a process, a node or memory is lost, and however slow one is."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import Wait, node_ids
from hasten.cluster.runtime.placement import grows, nodes, packs
from hasten.cluster.runtime.recovery import Batches, Pace

_LOG = logging.getLogger(__name__)
# How often it is looked whether tasks are late, and whether there is a place for them.
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class _Running:
    """A task at work: its number, the CPUs that it asked for, and since when."""

    number: int
    cpus: float
    started: float


class Tasks:
    """So many tasks of one function, of which some run at once; call(number): the arguments.

    A task that is lost runs again, with no CPUs of its own where no node that is left has so many. One that takes too
    long also runs where another has ended: the first result counts. cpus and gpus: of each.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        call: Callable[[int], tuple[Any, ...]],
        count: int,
        at_once: int,
        cpus: float,
        gpus: float,
        batches: Batches,
    ) -> None:
        self._function, self._call, self._at_once = function, call, at_once
        self._cpus, self._gpus, self._batches = cpus, gpus, batches
        self._queue, self._left = deque(range(count)), set(range(count))
        self._running: dict[Any, _Running] = {}
        self._pace = Pace()
        self._losses = 0
        self._waiting: Wait | None = None

    def results(self) -> Iterator[tuple[int, Any]]:
        """Number and result of every task, as they end; inside a Ray session, once."""
        import ray

        self._known = node_ids()
        while self._left:
            while self._queue and len(self._running) < self._at_once:
                self._send(self._queue.popleft(), self._cpus)
            ready, _ = ray.wait(list(self._running), timeout=_SECONDS_BETWEEN_LOOKS)
            for reference in ready:
                task = self._running.pop(reference)
                try:
                    found = recovery.get(reference)
                except ray.exceptions.RayError as error:
                    self._lose(task, error)
                else:
                    self._end(task)
                    yield task.number, found
            if not ready:
                there = nodes()
                self._share(there)
                self._hedge(there)

    def _send(self, number: int, cpus: float) -> None:
        import ray

        # Not tried again by Ray: it would do so without end where memory runs out.
        task: Any = ray.remote(self._function).options(
            num_cpus=cpus,
            num_gpus=self._gpus,
            max_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(int(self._cpus))}},
        )
        self._running[task.remote(*self._call(number))] = _Running(number, cpus, time.monotonic())

    def _lose(self, task: _Running, error: Exception) -> None:
        """Start a lost task again, unless another process does the same; raise what is no loss."""
        self._losses += 1
        if self._losses == recovery.ATTEMPTS:
            raise error
        alone = all(each.number != task.number for each in self._running.values())
        if recovery.is_out_of_memory(error):
            # Another process that does the same may have the memory.
            if alone:
                self._batches.halve(task.number, "a task")
        elif recovery.is_loss(error):
            _LOG.warning("lost a task (%s); starting it again", recovery.reason(error))
        else:
            raise error
        if alone:
            self._send(task.number, task.cpus)

    def _end(self, task: _Running) -> None:
        """A task has given its result: another process that does the same is ended."""
        import ray

        self._losses = 0
        self._pace.note(time.monotonic() - task.started)
        self._left.remove(task.number)
        for other in [other for other, each in self._running.items() if each.number == task.number]:
            del self._running[other]
            ray.cancel(other, force=True)

    def _share(self, there: list[Any]) -> None:
        """Tasks that no node has room for any more share the processors that there are; for GPUs they wait."""
        import ray

        now_known = node_ids()
        self._known |= now_known
        # Before a loss a task that no node holds waits for one that the autoscaler is yet to add.
        if self._known == now_known and grows():
            return
        for reference, task in list(self._running.items()):
            if self._gpus and not packs(there, [{"GPU": self._gpus}]):
                self._waiting = self._waiting or Wait("a task")
                self._waiting.go_on(f"{self._gpus:g} GPU(s)")
            elif not packs(there, [{"CPU": task.cpus, "GPU": self._gpus}]):
                _LOG.warning("no node that is left has %g CPUs: a task shares those that there are", task.cpus)
                del self._running[reference]
                ray.cancel(reference, force=True)
                self._send(task.number, 0)
            else:
                self._waiting = None

    def _hedge(self, there: list[Any]) -> None:
        """Start late tasks once more where there is a place: one that waits for it would help nobody."""
        now = time.monotonic()
        numbers = [task.number for task in self._running.values()]
        for task in list(self._running.values()):
            bundles = [{"CPU": each.cpus, "GPU": self._gpus} for each in (*self._running.values(), task)]
            free = len(self._running) < self._at_once and packs(there, bundles)
            if free and numbers.count(task.number) == 1 and self._pace.is_late(now - task.started):
                _LOG.info("a task has been running for %.0f s: another process does the same", now - task.started)
                self._send(task.number, task.cpus)
