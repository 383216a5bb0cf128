"""Which errors are recoverable, and the rules of recovery: the one file that knows what Ray raises after a loss.

A process, an actor or a node may be lost at any moment. Lost work is re-executed by the actor's replacement
(actor_pool.py) or in another task (tasks.py), work that ran out of memory with half the batch, and stragglers are
re-executed speculatively (dispatcher.py).
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
# Work that failed this often in a row, without one result in between, has a cause of its own.
ATTEMPTS = 10
# A call is a straggler when it takes this many times the longest recent one of its kind, and at least so many seconds:
# the start of a process on a busy machine, swapping or a page fault can delay any call, and a second execution takes
# processors from calls that are on time.
_STRAGGLER_FACTOR = 1.5
_STRAGGLER_SECONDS = 1.0
# Calls that are compared with: one that was suspended for a while is forgotten after these.
_RECENT_CALLS = 32


def is_loss(error: BaseException) -> bool:
    """Whether a Ray error means that a process, a node or an object was lost, so that the work can be re-executed.

    False for an error in an actor's constructor, which its replacement would raise as well, and for the end of the
    driver's own raylet, with which the driver's objects are gone.
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
    """Whether the actor that was called was lost, and not one of the call's arguments."""
    return isinstance(error, exceptions.RayActorError | exceptions.OutOfMemoryError) and not isinstance(
        error, exceptions.RayTaskError
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a node (where Ray kills a process), a process or a GPU ran out of memory."""
    for cause in [error, *_causes(error)]:
        if isinstance(cause, exceptions.OutOfMemoryError | MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(cause, exceptions.RayActorError) and "running low on memory" in str(cause):
            return True
        # torch has no exception type of its own for this on a CPU.
        if isinstance(cause, RuntimeError) and "DefaultCPUAllocator" in str(cause):
            return True
    return False


def _causes(error: BaseException) -> list[BaseException]:
    """The exception that a remote call raised; if it came from another call that it waited for, that one's, too."""
    causes: list[BaseException] = []
    cause = getattr(error, "cause", None) if isinstance(error, exceptions.RayTaskError) else None
    while isinstance(cause, BaseException) and cause not in causes:
        causes.append(cause)
        cause = getattr(cause, "cause", None)
    return causes


def raise_if_refused(error: BaseException) -> None:
    """Re-raise errors that another attempt would raise as well: UserError, and any error of an actor's constructor."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            raise cause from None
    if getattr(error, "actor_init_failed", False):
        # Of an exception in a constructor Ray keeps only the text.
        name, _, message = str(error).strip().rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
        if name:
            raise UserError(message) from None
        raise error


def get(reference: object) -> Any:
    """ray.get, of one reference or a list, that raises a UserError as it was raised in the actor or task."""
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
    """Results of those calls that end within so many seconds and without an error."""
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
    """Result of work that needs all actors at once, so that a loss means to start it again.

    lost, out_of_memory: called before the next attempt, to replace actors and to halve the batch.
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
    """One line that says why an actor or task failed; Ray's text on a dead actor has it behind a list of names."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    causes = [line for line in lines if line.startswith(("The actor is dead because", "The actor died because"))]
    return (causes or lines)[0].partition(" Some common causes include")[0].strip()


class Batches:
    """The batch of every worker, halved once when the worker runs out of memory.

    option: the config key of the batch, for messages. instead: how else to save memory, for messages.
    """

    def __init__(self, option: str, batch: int, instead: str) -> None:
        self._option, self._batch, self._instead = option, batch, instead
        self._halved: dict[int, int] = {}

    def of(self, worker: int) -> int:
        """Batch of a worker."""
        return self._halved.get(worker, self._batch)

    def halve(self, worker: int, what: str) -> None:
        """Use half the batch from now on, and warn; UserError if it is 1 or was halved before. what: the worker."""
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
    """Tells which calls of a kind take so long that they should be re-executed on another worker.

    No call is a straggler before one has ended; it is compared with the longest of the last few that have.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_RECENT_CALLS)

    def note(self, seconds: float) -> None:
        """A call has ended after so many seconds."""
        self._seconds.append(seconds)

    def is_late(self, seconds: float) -> bool:
        """Whether a call that has been running for so many seconds is a straggler."""
        return bool(self._seconds) and seconds >= max(_STRAGGLER_SECONDS, _STRAGGLER_FACTOR * max(self._seconds))
