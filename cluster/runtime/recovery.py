"""Classification of Ray's errors, and the rules of recovery; no other module interprets what Ray raises after a loss.

A process, an actor or a node may be lost at any moment. Lost work is re-executed by the actor's replacement
(actor_pool.py) or in another task (tasks.py). Work that ran out of memory is re-executed with half the batch, and
stragglers are re-executed speculatively (dispatcher.py).
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray import ObjectRef, exceptions

from hasten.accel.errors import UserError

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
# After this many failures in a row, without a result in between, the error is raised: it is not an accidental loss.
ATTEMPTS = 10
# A call is a straggler if it takes longer than both of these: a multiple of the longest recent call of its kind, and a
# minimum. The start of a process on a busy machine, swapping or a page fault can delay any call, and a second execution
# takes CPU time from calls that are on time.
_STRAGGLER_FACTOR = 1.5
_STRAGGLER_SECONDS = 1.0
# Number of recent calls for the comparison, so that one that was suspended for a while is forgotten.
_RECENT_CALLS = 32


def is_loss(error: BaseException) -> bool:
    """Whether a Ray error means that a process, a node or an object was lost, so that the work can be re-executed.

    False for an error in an actor's constructor, which its replacement would raise as well, and for the end of the
    driver's own raylet, with which the driver's objects are lost.
    """
    if getattr(error, "actor_init_failed", False):
        return False
    lost = (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
    )
    return isinstance(error, lost) or any(isinstance(cause, lost) for cause in _causes(error))


def is_actors_own(error: BaseException) -> bool:
    """Whether the called actor was lost, and not an argument of the call."""
    return isinstance(error, exceptions.RayActorError | exceptions.OutOfMemoryError) and not isinstance(
        error, exceptions.RayTaskError
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a node (then Ray kills a process), a process or a GPU ran out of memory."""
    for cause in [error, *_causes(error)]:
        if isinstance(cause, exceptions.OutOfMemoryError | MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(cause, exceptions.RayActorError) and "running low on memory" in str(cause):
            return True
        # On a CPU, torch raises a RuntimeError for this.
        if isinstance(cause, RuntimeError) and "DefaultCPUAllocator" in str(cause):
            return True
    return False


def _causes(error: BaseException) -> list[BaseException]:
    """The exception that a remote call raised, and those of nested remote calls that caused it."""
    causes: list[BaseException] = []
    cause = getattr(error, "cause", None) if isinstance(error, exceptions.RayTaskError) else None
    while isinstance(cause, BaseException) and cause not in causes:
        causes.append(cause)
        cause = getattr(cause, "cause", None)
    return causes


def raise_if_refused(error: BaseException) -> None:
    """Raise errors that another attempt would raise as well: UserError, and any error of an actor's constructor."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            raise cause from None
    if getattr(error, "actor_init_failed", False):
        # Ray keeps only the text of an exception in a constructor.
        name, _, message = str(error).strip().rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
        if name:
            raise UserError(message) from None
        raise error


def get(reference: object) -> Any:
    """ray.get of one reference or a list. A UserError of an actor or task is raised unwrapped."""
    try:
        return ray.get(reference)  # type: ignore[call-overload]
    except exceptions.RayError as error:
        raise_if_refused(error)
        raise


def raise_unless_lost(error: BaseException) -> None:
    """Re-raise an error that is neither a loss nor out of memory."""
    if not (is_loss(error) or is_out_of_memory(error)):
        raise error


def answers(references: "Sequence[ObjectRef[T]]", seconds: float = 5.0) -> list[T]:
    """Results of the calls that end without an error within `seconds`."""
    ready, _ = ray.wait(list(references), num_returns=len(references), timeout=seconds) if references else ([], [])
    results = []
    for reference in ready:
        try:
            results.append(ray.get(reference))
        except exceptions.RayError:
            continue
    return results


def retry(
    work: Callable[[], T], lost: Callable[[BaseException], None], out_of_memory: Callable[[BaseException], None]
) -> T:
    """Result of work that needs all actors at once, so that it is repeated as a whole after a loss.

    lost, out_of_memory: called with the error before the next attempt, to replace actors or to halve the batch.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except exceptions.RayError as error:
            raise_if_refused(error)
            if attempt == ATTEMPTS:
                raise
            if is_out_of_memory(error):
                out_of_memory(error)
            elif is_loss(error):
                lost(error)
            else:
                raise
    raise AssertionError("unreachable")


def reason(error: BaseException) -> str:
    """One line with the reason of an actor's or task's failure; Ray's text for a dead actor has it in a later line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    causes = [line for line in lines if line.startswith(("The actor is dead because", "The actor died because"))]
    return (causes or lines)[0].partition(" Some common causes include")[0].strip()


class Batches:
    """The batch size of every worker, which is halved once when the worker runs out of memory.

    option: config key of the batch size, for messages. instead: other ways to save memory, for messages.
    """

    def __init__(self, option: str, batch: int, instead: str) -> None:
        self._option, self._batch, self._instead = option, batch, instead
        self._halved: dict[int, int] = {}

    def of(self, worker: int) -> int:
        """Batch size of a worker."""
        return self._halved.get(worker, self._batch)

    def halve(self, worker: int, what: str) -> None:
        """Halve a worker's batch size and warn; UserError if it is 1 or was halved before. what: the worker's name."""
        now = self.of(worker)
        if worker in self._halved:
            smaller = f"set {self._option}={now // 2}, or " if now > 1 else ""
            raise UserError(
                f"{what} ran out of memory with {self._option}={now} (half of {self._batch}): {smaller}{self._instead}"
            )
        if now == 1:
            raise UserError(f"{what} ran out of memory with {self._option}=1: {self._instead}")
        self._halved[worker] = now // 2
        _LOG.warning(
            "%s ran out of memory with %s=%d: trying once more with %d; the last bits of the result may differ",
            what,
            self._option,
            now,
            now // 2,
        )


class StragglerDetector:
    """Detects calls that take so long that they should be re-executed on another worker.

    A running call is compared with the longest of the recent calls that have ended. Before the first has ended, no call
    is a straggler.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_RECENT_CALLS)

    def note(self, seconds: float) -> None:
        """Add the duration of a call that has ended."""
        self._seconds.append(seconds)

    def is_late(self, seconds: float) -> bool:
        """Whether a call that has been running for `seconds` is a straggler."""
        return bool(self._seconds) and seconds >= max(_STRAGGLER_SECONDS, _STRAGGLER_FACTOR * max(self._seconds))
