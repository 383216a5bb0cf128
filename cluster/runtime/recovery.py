"""What is lost on a cluster and done again: the one file that knows what Ray says of losses.

A process, an actor or a node may go at any moment. Work that was lost is done again, by the actor's successor (crew.py)
or in another task; work that lacks memory once more in halves; work that takes too long elsewhere as well.
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from hasten.accel.errors import UserError

_LOG = logging.getLogger(__name__)
# Work that failed so often in a row, without one result, fails for a reason of its own.
ATTEMPTS = 10
# A call is late after so many times the longest one of its kind, and not before what a start on a busy machine, a swap
# or a page fault can make of any call: else twins would take processors from calls that are on time.
_LATE = 1.5
_LATE_SECONDS = 1.0
# Calls that have ended and count for that: one that stood still for a while is forgotten.
_LAST = 32


def is_loss(error: BaseException) -> bool:
    """Whether an error of Ray's says that a process, a node or an object is gone, so that the work may be done again.

    Not so: what an actor raises as it is made, which its successor would raise as well, and the end of the driver's own
    raylet, with which the driver's objects are gone.
    """
    from ray import exceptions

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
    """Whether a loss is that of the actor that was called, and not of something that the call was given."""
    from ray import exceptions

    return isinstance(error, exceptions.RayActorError | exceptions.OutOfMemoryError) and not isinstance(
        error, exceptions.RayTaskError
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a node (Ray ends a process there), of a process, or of a GPU."""
    from ray import exceptions

    for each in [error, *_causes(error)]:
        if isinstance(each, exceptions.OutOfMemoryError | MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(each, exceptions.RayActorError) and "running low on memory" in str(each):
            return True
        # What torch raises on a CPU has no type of its own.
        if isinstance(each, RuntimeError) and "DefaultCPUAllocator" in str(each):
            return True
    return False


def _causes(error: BaseException) -> list[BaseException]:
    """What a call raised; where that is what another call raised, which it waited for, that too."""
    from ray import exceptions

    found: list[BaseException] = []
    cause = getattr(error, "cause", None) if isinstance(error, exceptions.RayTaskError) else None
    while isinstance(cause, BaseException) and cause not in found:
        found.append(cause)
        cause = getattr(cause, "cause", None)
    return found


def raise_if_refused(error: BaseException) -> None:
    """Raise what another try would raise as well: a user's mistake as it was raised, anything as an actor is made."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            raise cause from None
    if getattr(error, "actor_init_failed", False):
        # Ray keeps no more of the exception than its text.
        name, _, message = str(error).strip().rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
        if name:
            raise UserError(message) from None
        raise error


def get(reference: Any) -> Any:
    """ray.get, of one reference or a list, which raises a user's mistake as it was raised."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise_if_refused(error)
        raise


def answers(references: Sequence[Any], seconds: float = 5.0) -> list[Any]:
    """Results of those calls that end, without an error, in so many seconds."""
    import ray

    ready, _ = ray.wait(list(references), num_returns=len(references), timeout=seconds) if references else ([], [])
    found = []
    for reference in ready:
        try:
            found.append(ray.get(reference))
        except ray.exceptions.RayError:
            continue
    return found


def reason(error: BaseException) -> str:
    """One line that says why; of an actor's death Ray tells the cause behind a list of names."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    told = [line for line in lines if line.startswith(("The actor is dead because", "The actor died because"))]
    return (told or lines)[0].partition(" Some common causes include")[0].strip()


class Batches:
    """The batch of every worker, which is halved once where its memory runs out.

    option: the knob in messages. instead: other knobs that save memory.
    """

    def __init__(self, option: str, batch: int, instead: str) -> None:
        self._option, self._batch, self._instead = option, batch, instead
        self._halved: dict[int, int] = {}

    def of(self, worker: int) -> int:
        """Batch of a worker."""
        return self._halved.get(worker, self._batch)

    def halve(self, worker: int, what: str) -> None:
        """Half the batch from now on, with a warning; UserError where that is not possible or was done before."""
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


class Pace:
    """How long calls of a kind take, and which is so late that it is made elsewhere as well: the first result counts.

    Nothing is late before one has ended; of those that have, the last few count.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_LAST)

    def note(self, seconds: float) -> None:
        """A call has ended."""
        self._seconds.append(seconds)

    def is_late(self, seconds: float) -> bool:
        """Whether a call that has been running for so long is."""
        return bool(self._seconds) and seconds >= max(_LATE_SECONDS, _LATE * max(self._seconds))
