"""The loop of all distributed work: it assigns keys to workers, waits, and re-executes lost and straggling assignments.

A `Workload` defines what differs between programs: how an assignment is submitted, what it returns, and how a worker is
replaced. Every key gets exactly one result, whose value must not depend on the worker that computed it.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayError

from hasten.cluster.runtime import actor_pool, recovery
from hasten.cluster.runtime.actor_pool import ActorPool
from hasten.cluster.runtime.recovery import StragglerDetector

_LOG = logging.getLogger(__name__)
# Interval of checks for stragglers and for lost or replaced actors.
POLL_SECONDS = 0.25

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


@dataclass(eq=False)
class Assignment(Generic[K]):
    """Keys that one worker computes in one call.

    keys: those whose result is still needed, in the order in which the worker computes them; empty once other workers
    have computed all. handle: what the workload returned on submission. owner: the actor that it was submitted to; None
    for a task.
    """

    worker: int
    keys: list[K]
    handle: object
    owner: object


class Queue(Protocol[K]):
    """Keys that are not assigned yet."""

    def take(self, worker: int, idle: bool) -> list[K]:
        """Keys of the worker's next assignment, empty for none. idle: whether it has no other assignment."""

    def put_back(self, worker: int, keys: Sequence[K]) -> None:
        """Return the keys of a failed assignment to the front."""


class SharedQueue(Generic[K]):
    """One queue for all workers. size: function from the number of queued keys to that of an assignment; None is 1."""

    def __init__(self, keys: Iterable[K], size: Callable[[int], int] | None = None) -> None:
        self._keys = deque(keys)
        self._size = size

    def take(self, worker: int, idle: bool) -> list[K]:
        """The first keys of the queue."""
        size = 1 if self._size is None else self._size(len(self._keys))
        return [self._keys.popleft() for _ in range(min(size, len(self._keys)))]

    def put_back(self, worker: int, keys: Sequence[K]) -> None:
        """Return keys to the front, in their order."""
        self._keys.extendleft(reversed(keys))


class Workload(ABC, Generic[K, R]):
    """The part of distributed work that differs between programs.

    name: of a worker in messages, such as `a verifier`. depth: number of assignments that a worker has at once; with 2,
    the next one is queued when one ends.
    """

    name: str
    depth: int = 1

    @abstractmethod
    def workers(self) -> Sequence[int]:
        """Workers that can be given an assignment."""

    @abstractmethod
    def submit(self, worker: int, keys: Sequence[K]) -> object:
        """Start an assignment; returns its handle."""

    @abstractmethod
    def wait(self, handles: Sequence[object], seconds: float) -> Sequence[object]:
        """Handles with new results; empty after `seconds`. Replacements of lost actors are started meanwhile."""

    @abstractmethod
    def receive(self, assignment: Assignment[K]) -> tuple[Sequence[tuple[K, R]], bool]:
        """New results, and whether the assignment has ended. Raises RayError if it failed, which ends it, too."""

    @abstractmethod
    def recover(self, worker: int, keys: Sequence[K], error: RayError) -> None:
        """Replace a worker or halve its batch; re-raise errors that are not recoverable.

        keys: those of the failed assignment that no other worker computes.
        """

    def owner(self, worker: int) -> object:
        """The worker's current actor; assignments to an earlier one are lost. None for tasks."""
        return None

    def kind(self, worker: int) -> Hashable:
        """Kind of the worker's next assignment: durations are compared within a kind."""
        return None

    def batch(self, worker: int) -> int:
        """Number of a straggler's keys that an idle worker re-executes at once."""
        return 1

    def is_repeatable(self, key: K) -> bool:
        """Whether another worker may re-execute a straggler's key, and has resources for it."""
        return True

    def cancel(self, assignment: Assignment[K]) -> bool:
        """Cancel an assignment whose results came from other workers; returns whether it was cancelled.

        An actor's call cannot be cancelled: the actor stays busy until the call ends.
        """
        return False


class Dispatcher(Generic[K, R]):
    """Runs a workload; the first result of a key counts.

    Use one dispatcher for several runs of a workload: it knows which workers are still busy with earlier assignments,
    and the durations of earlier calls. clock: for these durations, in seconds.
    """

    def __init__(self, workload: Workload[K, R], clock: Callable[[], float] = time.monotonic) -> None:
        self._workload, self._clock = workload, clock
        self._running: list[Assignment[K]] = []
        self._detectors: dict[Hashable, StragglerDetector] = {}
        # For each busy worker: when its current assignment or its wait for the next result began, and its kind.
        self._periods: dict[int, tuple[float, Hashable]] = {}
        self._failures = 0

    def run(self, keys: Iterable[K], queue: Queue[K]) -> Iterator[tuple[K, R]]:
        """(key, result) of every key, in the order of arrival; the queue must hold all keys."""
        missing = set(keys)
        for assignment in self._running:
            assignment.keys.clear()
        self._failures = 0
        while missing:
            self._drop_lost(queue)
            self._assign(queue)
            for assignment in self._ready(POLL_SECONDS):
                for key, result in self._receive(assignment, queue):
                    missing.remove(key)
                    yield key, result

    def settle(self, seconds: float) -> None:
        """Wait up to `seconds` for assignments to end; the others keep their workers busy."""
        until = self._clock() + seconds
        while self._running and self._clock() < until:
            for assignment in self._ready(seconds / 5):
                try:
                    _, has_ended = self._workload.receive(assignment)
                except RayError:
                    has_ended = True  # the worker's next assignment will raise the loss again
                if has_ended:
                    self._running.remove(assignment)

    def reset(self) -> None:
        """Forget all assignments, after all workers were ended."""
        self._running.clear()

    def is_busy(self, worker: int) -> bool:
        """Whether a worker has an assignment."""
        return any(assignment.worker == worker for assignment in self._running)

    def _assign(self, queue: Queue[K]) -> None:
        for worker in self._workload.workers():
            count = sum(assignment.worker == worker for assignment in self._running)
            while count < self._workload.depth:
                keys = queue.take(worker, idle=not count)
                if not keys and not count:
                    keys = self._straggling(worker)
                if not keys:
                    break
                if not count:
                    self._begin_period(worker)
                handle = self._workload.submit(worker, keys)
                self._running.append(Assignment(worker, list(keys), handle, self._workload.owner(worker)))
                count += 1

    def _ready(self, seconds: float) -> list[Assignment[K]]:
        ready = self._workload.wait([assignment.handle for assignment in self._running], seconds)
        return [assignment for assignment in self._running if any(assignment.handle is handle for handle in ready)]

    def _receive(self, assignment: Assignment[K], queue: Queue[K]) -> list[tuple[K, R]]:
        """New results of an assignment, without those of keys that already have one."""
        # An assignment received before this one may have cancelled or dropped it.
        if assignment not in self._running:
            return []
        try:
            received, has_ended = self._workload.receive(assignment)
        except RayError as error:
            self._fail(assignment, error, queue)
            return []
        first = [(key, result) for key, result in received if key in assignment.keys]
        if has_ended:
            self._running.remove(assignment)
        if first:
            self._failures = 0
            since, kind = self._periods[assignment.worker]
            self._detector(kind).note(self._clock() - since)
        if received or has_ended:
            self._begin_period(assignment.worker)
        for key, _ in first:
            self._supersede(key)
        return first

    def _supersede(self, key: K) -> None:
        """Remove a key that has a result from all other assignments."""
        for other in [assignment for assignment in self._running if key in assignment.keys]:
            other.keys.remove(key)
            if not other.keys and self._workload.cancel(other):
                self._running.remove(other)

    def _fail(self, assignment: Assignment[K], error: RayError, queue: Queue[K]) -> None:
        self._running.remove(assignment)
        self._failures += 1
        if self._failures == recovery.ATTEMPTS:
            raise error
        keys = self._without_copies(assignment)
        self._workload.recover(assignment.worker, keys, error)
        self._drop_lost(queue)
        queue.put_back(assignment.worker, keys)

    def _drop_lost(self, queue: Queue[K]) -> None:
        """Put back the keys that were submitted to actors that have been replaced."""
        for assignment in reversed(self._running.copy()):
            if self._workload.owner(assignment.worker) is not assignment.owner:
                self._running.remove(assignment)
                queue.put_back(assignment.worker, self._without_copies(assignment))

    def _without_copies(self, assignment: Assignment[K]) -> list[K]:
        """Keys of an assignment that are in no other assignment."""
        others = {key for other in self._running if other is not assignment for key in other.keys}
        return [key for key in assignment.keys if key not in others]

    def _straggling(self, worker: int) -> list[K]:
        """Keys for an idle worker to re-execute: the last keys of the oldest straggler, in reverse order.

        The straggler is least likely to get to its last keys.
        """
        now = self._clock()
        busy = {assignment.worker for assignment in self._running if assignment.keys}
        for other in sorted(busy, key=lambda worker: self._periods[worker][0]):
            since, kind = self._periods[other]
            if not self._detector(kind).is_late(now - since):
                continue
            assignments = [assignment for assignment in self._running if assignment.worker == other]
            keys = [key for assignment in assignments for key in self._without_copies(assignment)]
            keys = [key for key in keys if self._workload.is_repeatable(key)]
            if keys:
                _LOG.info(
                    "%s is a straggler (%.0f s); re-executing its work on an idle one", self._workload.name, now - since
                )
                return keys[-self._workload.batch(worker) :][::-1]
        return []

    def _begin_period(self, worker: int) -> None:
        self._periods[worker] = self._clock(), self._workload.kind(worker)

    def _detector(self, kind: Hashable) -> StragglerDetector:
        return self._detectors.setdefault(kind, StragglerDetector())


class PoolWorkload(Workload[K, R]):
    """A workload for a pool of actors; an assignment is one key, one call and one result."""

    def __init__(self, pool: ActorPool) -> None:
        self.pool = pool
        self.name = pool.name

    def workers(self) -> Sequence[int]:
        """Indices of the actors that are alive."""
        return self.pool.alive

    def owner(self, worker: int) -> object:
        """The actor."""
        return self.pool.actors[worker] if self.pool.actors else None

    def wait(self, handles: Sequence[object], seconds: float) -> Sequence[object]:
        """All ready handles, once one is ready."""
        return all_ready([self.pool], handles, seconds)

    def receive(self, assignment: Assignment[K]) -> tuple[Sequence[tuple[K, R]], bool]:
        """The result of the only key; a result that is not needed any more is not fetched."""
        if not assignment.keys:
            return [], True
        (key,) = assignment.keys
        return [(key, recovery.get(assignment.handle))], True


def all_ready(pools: Iterable[ActorPool], handles: Sequence[object], seconds: float) -> Sequence[object]:
    """All ready references and streams, once one is ready; empty after `seconds`, or when an actor was replaced."""
    if not actor_pool.wait(pools, handles, seconds):
        return []
    return list(ray.wait(list(handles), num_returns=len(handles), timeout=0)[0])
