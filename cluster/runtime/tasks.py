"""Ray tasks with recovery: lost tasks are re-executed, out of memory halves the batch, stragglers are duplicated."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import Wait, node_ids
from hasten.cluster.runtime.dispatcher import Assignment, Dispatcher, SharedQueue, Workload
from hasten.cluster.runtime.placement import ActorResources, Bundle, grows, nodes, packs
from hasten.cluster.runtime.recovery import Batches

_LOG = logging.getLogger(__name__)
R = TypeVar("R")


@dataclass(eq=False)
class _Task:
    """A submitted task. number: its index among all tasks. reference: of its result."""

    number: int
    reference: ObjectRef


def task_results(
    function: Callable[..., R],
    arguments: Callable[[int], tuple[object, ...]],
    count: int,
    at_once: int,
    needs: ActorResources,
    batches: Batches,
) -> Iterator[tuple[int, R]]:
    """(number, result) of each of `count` tasks of one function, as they end; inside a Ray session.

    arguments(number): arguments of a task, called before every attempt. at_once: number of tasks that run at the same
    time. needs: resources of each task; if no remaining node has as many CPUs, a task requests none. batches: batch
    sizes by number.
    """
    work = _TaskWorkload(function, arguments, at_once, needs, batches)
    yield from Dispatcher(work).run(range(count), SharedQueue(range(count)))


class _TaskWorkload(Workload[int, R], Generic[R]):
    """Tasks of one function; a worker is one of the `at_once` places for running tasks."""

    name = "a task"

    def __init__(
        self,
        function: Callable[..., R],
        arguments: Callable[[int], tuple[object, ...]],
        at_once: int,
        needs: ActorResources,
        batches: Batches,
    ) -> None:
        self._function, self._arguments, self._at_once = function, arguments, at_once
        self._needs, self._batches = needs, batches
        # CPUs that a task requests, if they differ from what it needs.
        self._cpus: dict[int, float] = {}
        self._running: list[_Task] = []
        self._known_nodes = node_ids()
        self._waiting: Wait | None = None

    def workers(self) -> Sequence[int]:
        """Indices of the places."""
        return range(self._at_once)

    def submit(self, worker: int, keys: Sequence[int]) -> _Task:
        """Start a task."""
        (number,) = keys
        task = _Task(number, self._start(number))
        self._running.append(task)
        return task

    def wait(self, handles: Sequence[object], seconds: float) -> Sequence[object]:
        """Tasks that have ended."""
        tasks = self._running.copy()
        ready, _ = ray.wait([task.reference for task in tasks], num_returns=1, timeout=seconds)
        if not ready:
            self._share_cpus()
            return []
        ready, _ = ray.wait([task.reference for task in tasks], num_returns=len(tasks), timeout=0)
        return [task for task in tasks if task.reference in ready]

    def receive(self, assignment: Assignment[int]) -> tuple[Sequence[tuple[int, R]], bool]:
        """The task's result."""
        task = self._end(assignment)
        return [(task.number, recovery.get(task.reference))], True

    def recover(self, worker: int, keys: Sequence[int], error: RayError) -> None:
        """Only warn or halve the batch: the dispatcher starts the task again."""
        if recovery.is_out_of_memory(error):
            # `keys` is empty if a copy of the task is still running, which may have enough memory.
            for number in keys:
                self._batches.halve(number, self.name)
        elif recovery.is_loss(error):
            _LOG.warning("lost a task (%s); restarting it", recovery.reason(error))
        else:
            raise error

    def is_repeatable(self, key: int) -> bool:
        """Whether a node has room for a copy beside all running tasks: a copy that waits would not help."""
        running = [self._bundle(task.number) for task in self._running]
        return packs(nodes(), [*running, self._bundle(key)])

    def cancel(self, assignment: Assignment[int]) -> bool:
        """End the task's process."""
        ray.cancel(self._end(assignment).reference, force=True)
        return True

    def _end(self, assignment: Assignment[int]) -> _Task:
        task = assignment.handle
        assert isinstance(task, _Task)
        self._running.remove(task)
        return task

    def _bundle(self, number: int) -> Bundle:
        return {**self._needs.bundle, "CPU": self._cpus.get(number, self._needs.cpus)}

    def _start(self, number: int) -> ObjectRef:
        # Ray must not retry by itself: after out of memory it would retry without end.
        task = ray.remote(self._function).options(
            num_cpus=self._cpus.get(number, self._needs.cpus),
            num_gpus=self._needs.gpus,
            memory=self._needs.memory,
            max_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(int(self._needs.cpus))}},
        )
        reference: ObjectRef = task.remote(*self._arguments(number))
        return reference

    def _share_cpus(self) -> None:
        """After a loss, tasks for which no node has enough CPUs share them; for GPUs and memory they wait."""
        alive, known = nodes(), node_ids()
        self._known_nodes |= known
        # Before any loss, a task for which no node has room waits for the autoscaler to add one.
        if self._known_nodes == known and grows():
            return
        for task in self._running:
            if any(self._needs.fixed.values()) and not packs(alive, [self._needs.fixed]):
                self._waiting = self._waiting or Wait(self.name)
                self._waiting.go_on(self._needs.fixed_text())
            elif not packs(alive, [self._bundle(task.number)]):
                _LOG.warning("no remaining node has %g CPUs: a task shares those of others", self._needs.cpus)
                self._cpus[task.number] = 0
                ray.cancel(task.reference, force=True)
                task.reference = self._start(task.number)
            else:
                self._waiting = None
