"""One loop for all distributed work: assign keys to workers, wait, count losses, re-execute what was lost or is late.

A `Workload` says what differs between programs: how an assignment is submitted, what it returns, and how a worker is
recovered. Every key gets exactly one result, whose value must not depend on the worker that computed it.
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
# How often stragglers, and actors that were lost or replaced, are looked for.
POLL_SECONDS = 0.25

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


@dataclass(eq=False)
class Assignment(Generic[K]):
    """Keys that one worker computes in one call.

    keys: those whose result is still needed, in the worker's order; none once other workers were faster. handle: what
    the workload returned on submission. owner: the actor that it was submitted to, None for a task.
    """

    worker: int
    keys: list[K]
    handle: object
    owner: object


class Queue(Protocol[K]):
    """Keys that are not assigned yet."""

    def take(self, worker: int, idle: bool) -> list[K]:
        """Keys of one assignment; none if the worker should get none. idle: it has no other assignment."""

    def put_back(self, worker: int, keys: Sequence[K]) -> None:
        """Keys of a failed assignment, which come first again."""


class SharedQueue(Generic[K]):
    """One queue for all workers. size: of an assignment, by the number of keys that wait; None is 1."""

    def __init__(self, keys: Iterable[K], size: Callable[[int], int] | None = None) -> None:
        self._keys = deque(keys)
        self._size = size

    def take(self, worker: int, idle: bool) -> list[K]:
        """The first keys."""
        size = 1 if self._size is None else self._size(len(self._keys))
        return [self._keys.popleft() for _ in range(min(size, len(self._keys)))]

    def put_back(self, worker: int, keys: Sequence[K]) -> None:
        """To the front, in their order."""
        self._keys.extendleft(reversed(keys))


class Workload(ABC, Generic[K, R]):
    """What differs between programs.

    name: of a worker in messages, such as `a verifier`. depth: assignments that a worker has at once; with 2 the next
    one is there already when one ends.
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
        """Handles with something new, none after so many seconds; replacements of lost actors start meanwhile."""

    @abstractmethod
    def receive(self, assignment: Assignment[K]) -> tuple[Sequence[tuple[K, R]], bool]:
        """New results, and whether the assignment has ended. A RayError if it failed: it has ended, too."""

    @abstractmethod
    def recover(self, worker: int, keys: Sequence[K], error: RayError) -> None:
        """Replace a worker or halve its batch; raises errors that are not recoverable.

        keys: those of the failed assignment that no other worker computes.
        """

    def owner(self, worker: int) -> object:
        """The actor behind a worker; what was submitted to another one is lost. None for tasks."""
        return None

    def kind(self, worker: int) -> Hashable:
        """Kind of the worker's next assignment: durations are compared within a kind."""
        return None

    def batch(self, worker: int) -> int:
        """Keys of a straggler that an idle worker takes at once."""
        return 1

    def is_repeatable(self, key: K) -> bool:
        """Whether another worker may compute a straggler's key as well, and has room for it."""
        return True

    def cancel(self, assignment: Assignment[K]) -> bool:
        """End an assignment whose results came from other workers.

        False where that is impossible: an actor cannot be interrupted, and stays busy until its call ends.
        """
        return False


class Dispatcher(Generic[K, R]):
    """Runs a workload; the first result of a key counts.

    To be kept over several runs: workers may still be busy with assignments of earlier ones, and durations are known.
    clock: of these durations, in seconds.
    """

    def __init__(self, workload: Workload[K, R], clock: Callable[[], float] = time.monotonic) -> None:
        self._workload, self._clock = workload, clock
        self._running: list[Assignment[K]] = []
        self._detectors: dict[Hashable, StragglerDetector] = {}
        # Of each busy worker: since when it has been at its first assignment or its next result, and of which kind.
        self._periods: dict[int, tuple[float, Hashable]] = {}
        self._failures = 0

    def run(self, keys: Iterable[K], queue: Queue[K]) -> Iterator[tuple[K, R]]:
        """Every key, all of which the queue holds, with its result, in the order in which they come."""
        left = set(keys)
        for assignment in self._running:
            assignment.keys.clear()
        self._failures = 0
        while left:
            self._drop_lost(queue)
            self._assign(queue)
            for assignment in self._ready(POLL_SECONDS):
                for key, result in self._receive(assignment, queue):
                    left.remove(key)
                    yield key, result

    def settle(self, seconds: float) -> None:
        """Let assignments end that are about to; those that are not keep their workers busy."""
        until = self._clock() + seconds
        while self._running and self._clock() < until:
            for assignment in self._ready(seconds / 5):
                try:
                    _, has_ended = self._workload.receive(assignment)
                except RayError:
                    has_ended = True  # the next assignment of this worker will meet the loss
                if has_ended:
                    self._running.remove(assignment)

    def reset(self) -> None:
        """All workers have been ended."""
        self._running.clear()

    def is_busy(self, worker: int) -> bool:
        """Whether a worker has an assignment."""
        return any(each.worker == worker for each in self._running)

    def _assign(self, queue: Queue[K]) -> None:
        for worker in self._workload.workers():
            count = sum(each.worker == worker for each in self._running)
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
        ready = self._workload.wait([each.handle for each in self._running], seconds)
        return [each for each in self._running if any(each.handle is handle for handle in ready)]

    def _receive(self, assignment: Assignment[K], queue: Queue[K]) -> list[tuple[K, R]]:
        """The first results of their keys."""
        # What was received before may have cancelled or dropped this one.
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
        """Its result is there: other workers that compute it need not."""
        for other in [each for each in self._running if key in each.keys]:
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
        """Put back what was submitted to actors that have been replaced."""
        for assignment in reversed(self._running.copy()):
            if self._workload.owner(assignment.worker) is not assignment.owner:
                self._running.remove(assignment)
                queue.put_back(assignment.worker, self._without_copies(assignment))

    def _without_copies(self, assignment: Assignment[K]) -> list[K]:
        """Keys of an assignment that no other one holds."""
        others = {key for each in self._running if each is not assignment for key in each.keys}
        return [key for key in assignment.keys if key not in others]

    def _straggling(self, worker: int) -> list[K]:
        """What an idle worker computes as well: keys of the worker that is late longest, those first that it has last.

        That worker is the likeliest never to come to them.
        """
        now = self._clock()
        busy = {each.worker for each in self._running if each.keys}
        for other in sorted(busy, key=lambda each: self._periods[each][0]):
            since, kind = self._periods[other]
            if not self._detector(kind).is_late(now - since):
                continue
            assignments = [each for each in self._running if each.worker == other]
            keys = [key for each in assignments for key in self._without_copies(each)]
            keys = [key for key in keys if self._workload.is_repeatable(key)]
            if keys:
                _LOG.info("%s is late (%.0f s): another one computes the same", self._workload.name, now - since)
                return keys[-self._workload.batch(worker) :][::-1]
        return []

    def _begin_period(self, worker: int) -> None:
        self._periods[worker] = self._clock(), self._workload.kind(worker)

    def _detector(self, kind: Hashable) -> StragglerDetector:
        return self._detectors.setdefault(kind, StragglerDetector())


class PoolWorkload(Workload[K, R]):
    """A workload of actors in a pool, each assignment of which is one key and one call with one result."""

    def __init__(self, pool: ActorPool) -> None:
        self.pool = pool
        self.name = pool.name

    def workers(self) -> Sequence[int]:
        """Actors that are alive."""
        return self.pool.alive

    def owner(self, worker: int) -> object:
        """The actor."""
        return self.pool.actors[worker] if self.pool.actors else None

    def wait(self, handles: Sequence[object], seconds: float) -> Sequence[object]:
        """All that is ready once one is."""
        return all_ready([self.pool], handles, seconds)

    def receive(self, assignment: Assignment[K]) -> tuple[Sequence[tuple[K, R]], bool]:
        """The result of its only key; one that is not needed any more is not fetched."""
        if not assignment.keys:
            return [], True
        (key,) = assignment.keys
        return [(key, recovery.get(assignment.handle))], True


def all_ready(pools: Iterable[ActorPool], handles: Sequence[object], seconds: float) -> Sequence[object]:
    """Every reference or stream that is ready, once one is; none after so many seconds or once an actor is replaced."""
    if not actor_pool.wait(pools, handles, seconds):
        return []
    return list(ray.wait(list(handles), num_returns=len(handles), timeout=0)[0])
