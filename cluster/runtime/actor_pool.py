"""Actors of one kind, each with a successor once it is lost, on the nodes that are left.

A node's CPUs go with it: successors that find none of their own share those that others have, and wait for GPUs.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from hasten.accel.errors import UserError
from hasten.cluster.runtime.placement import grows, nodes, packs
from hasten.cluster.runtime.recovery import is_loss, raise_if_refused, reason

_LOG = logging.getLogger(__name__)
# How long an actor waits for a node with GPUs to come back, in seconds, may be set here.
WAIT_VARIABLE = "HASTEN_NODE_WAIT_SECONDS"
_WAIT_SECONDS = 600.0
_TELL_SECONDS = 30.0
# Others may have taken the CPUs that were lost with a node: an actor waits so long for them, and then shares.
_CPU_SECONDS = 60.0
_LOOK_SECONDS = 0.5
# Of actors that are busy it is not known for so long whether they are there. Those of one node go within the second.
_ASK_SECONDS = 30.0
_GRACE_SECONDS = 1.0


class Wait:
    """What is waited for while no node can hold it: told every 30 seconds, and given up after ten minutes.

    The environment variable HASTEN_NODE_WAIT_SECONDS sets another limit.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._since = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._since

    def go_on(self, needed: str) -> None:
        """Say what is waited for, from time to time; UserError once it has been too long."""
        limit = float(os.environ.get(WAIT_VARIABLE) or _WAIT_SECONDS)
        if self.seconds >= limit:
            raise UserError(
                f"{self._what} needs {needed}, which no node has had for {limit:g} s since one was lost: start a node "
                f"that has and run the same command again, what is finished is kept; {WAIT_VARIABLE} sets the limit"
            )
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            _LOG.warning(
                "%s waits for a node with %s (%.0f of at most %.0f s)", self._what, needed, self.seconds, limit
            )


def _nothing() -> None:
    """What a place is tried with."""


class _Vacancy:
    """The place of an actor that was lost, until its successor has one."""

    def __init__(self, what: str) -> None:
        self.wait = Wait(what)
        self.probe: Any = None
        self.asked: float | None = None


class Crew:
    """So many actors of one kind, each with a successor once it is lost.

    start(index, cpus): makes one that asks for so many CPUs; it has a method `usage`. what: one in messages.
    cpus, gpus: what each asks for. A successor that the nodes which are left cannot hold takes no CPUs of its own but
    shares those that others have; for a GPU it waits, see Wait. Until it has a place, it is None among the actors.
    restarts: successors so far.
    """

    def __init__(self, what: str, count: int, cpus: float, gpus: float, start: Callable[[int, float], Any]) -> None:
        self._what, self._count, self._cpus, self._gpus, self._start = what, count, cpus, gpus, start
        self.actors: list[Any] = []
        self.restarts = 0
        self._vacant: dict[int, _Vacancy] = {}
        # CPUs of each actor, and the nodes that there were when it was asked for; answers of those still to come.
        self._seats: dict[int, tuple[float, frozenset[str]]] = {}
        self._new: dict[int, Any] = {}
        self._looked = 0.0

    def begin(self, fits: bool | None = None) -> None:
        """Start the actors, unless they are there.

        fits: whether the cluster holds all of them, with what is started beside them, or may grow to; None looks. Where
        it does not, as after a loss, each gets its place as a successor does, see fill().
        """
        if self.actors:
            return
        self.actors = [None] * self._count
        if fits is None:
            fits = _holds(self._count, self._cpus, self._gpus) or grows()
        for index in range(self._count):
            if fits:
                self._seat(index, self._cpus)
            else:
                self._vacant[index] = _Vacancy(self._what)

    @property
    def there(self) -> list[int]:
        """Those that have a place."""
        return [index for index, actor in enumerate(self.actors) if actor is not None]

    def replace(self, index: int, error: BaseException | None = None) -> None:
        """End an actor; it gets a successor as soon as there is a place, see look(). error: what told of its loss."""
        import ray

        if index in self._vacant:
            return
        if error is not None:
            _LOG.warning("lost %s (%s); starting another", self._what, reason(error))
        _kill(self.actors[index])
        self.actors[index] = None
        self._new.pop(index, None)
        self.restarts += 1
        cpus, there = self._seats.pop(index)
        # An actor that does not answer may be on a node of which it is not known yet that it is gone.
        if there <= node_ids() and not isinstance(error, ray.exceptions.ActorUnavailableError):
            self._seat(index, cpus)
        else:
            self._vacant[index] = _Vacancy(self._what)

    def look(self) -> bool:
        """Give successors their places; returns whether one has got its own. To be called every now and then."""
        import ray

        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS or not (self._vacant or self._new):
            return False
        self._looked = now
        for index, answer in list(self._new.items()):
            if ray.wait([answer], timeout=0)[0]:
                del self._new[index]
            elif not self._seats[index][1] <= node_ids():
                # It may have had its place there, and wait for ever for another: its calls fail, and it is replaced.
                del self._new[index]
                _kill(self.actors[index])
        before = len(self._vacant)
        for index, vacancy in list(self._vacant.items()):
            cpus = self._place(vacancy)
            if cpus is not None:
                del self._vacant[index]
                self._seat(index, cpus)
        return len(self._vacant) < before

    def fill(self) -> None:
        """Wait until all have a place."""
        while self._vacant:
            self.look()
            time.sleep(_LOOK_SECONDS / 2)

    def lost(self) -> dict[int, BaseException]:
        """Those that are gone, with what told so; asks all, and waits a while for those that are busy."""
        import ray

        asked = {self.actors[index].usage.remote(): index for index in self.there}
        found: dict[int, BaseException] = {}
        until = time.monotonic() + _ASK_SECONDS
        while asked and time.monotonic() < until:
            ready, _ = ray.wait(list(asked), timeout=_GRACE_SECONDS)
            for answer in ready:
                index = asked.pop(answer)
                try:
                    ray.get(answer)
                except ray.exceptions.RayError as error:
                    raise_if_refused(error)
                    found[index] = error
                    until = min(until, time.monotonic() + _GRACE_SECONDS)
        return found

    def end(self) -> None:
        """End all."""
        import ray

        for index in self.there:
            _kill(self.actors[index])
        for vacancy in self._vacant.values():
            if vacancy.probe is not None:
                ray.cancel(vacancy.probe)
        self.actors, self._vacant, self._seats, self._new = [], {}, {}, {}

    def _seat(self, index: int, cpus: float) -> None:
        self._seats[index] = cpus, node_ids()
        self.actors[index] = self._start(index, cpus)
        self._new[index] = self.actors[index].usage.remote()

    def _place(self, vacancy: _Vacancy) -> float | None:
        """CPUs that a successor may ask for now; None while it has to wait."""
        import ray

        if vacancy.probe is not None and ray.wait([vacancy.probe], timeout=0)[0]:
            probe, vacancy.probe = vacancy.probe, None
            try:
                ray.get(probe)
            except ray.exceptions.RayError as error:
                if not is_loss(error):
                    raise
            else:
                return vacancy.asked
        # Where the cluster grows, the task below is what an autoscaler adds a node for.
        if self._gpus and not (_holds(1, 0, self._gpus) or grows()):
            vacancy.wait.go_on(f"{self._gpus:g} GPU(s)")
            return None
        cpus = self._cpus if vacancy.asked is None else vacancy.asked
        late = vacancy.wait.seconds >= _CPU_SECONDS and not self._gpus
        if cpus and (late or not (_holds(1 if self._gpus else self._count, cpus, self._gpus) or grows())):
            _LOG.warning(
                "%s that was lost has no CPUs of its own any more: all %d share the %g that are left",
                self._what,
                self._count,
                ray.cluster_resources().get("CPU", 0),
            )
            cpus = 0.0
            if vacancy.probe is not None:
                ray.cancel(vacancy.probe)
                vacancy.probe = None
        if not cpus and not self._gpus:
            return cpus
        if vacancy.probe is None:
            # An actor that waits for a place cannot be told from one that is being made: a task that does nothing can.
            task = ray.remote(_nothing).options(num_cpus=cpus, num_gpus=self._gpus)
            vacancy.probe, vacancy.asked = task.remote(), cpus
        elif self._gpus:
            vacancy.wait.go_on(f"{self._gpus:g} free GPU(s)")
        return None


def wait(crews: Iterable[Crew], references: Sequence[Any], seconds: float | None = None) -> list[Any]:
    """What is ready among references, which may be none after so many seconds; successors find their places meanwhile.

    seconds None: waits as long as it takes.
    """
    import ray

    until = None if seconds is None else time.monotonic() + seconds
    while True:
        left = _LOOK_SECONDS if until is None else max(0.0, min(_LOOK_SECONDS, until - time.monotonic()))
        ready: list[Any] = []
        if references:
            ready, _ = ray.wait(list(references), num_returns=1, timeout=left)
        else:
            time.sleep(left)
        seated = [crew for crew in crews if crew.look()]
        if ready or seated or (until is not None and time.monotonic() >= until):
            return ready


def _kill(actor: Any) -> None:
    import ray

    with suppress(ray.exceptions.RayError):  # one that could not be made cannot be ended
        ray.kill(actor)


def _holds(count: int, cpus: float, gpus: float) -> bool:
    """Whether the nodes that are there could hold so many actors that ask for so much, were they free."""
    return packs(nodes(), [{"CPU": cpus, "GPU": gpus}] * count)


def node_ids() -> frozenset[str]:
    """Names that Ray has for the nodes that are there."""
    import ray

    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
