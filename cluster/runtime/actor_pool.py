"""A pool of equal actors; a lost actor is replaced on the remaining nodes.

If the remaining nodes lack CPUs, replacements share those of other actors. If they lack GPUs or memory, replacements
wait for a node.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError

from hasten.accel.errors import UserError
from hasten.cluster.runtime.placement import ActorResources, grows, nodes, packs
from hasten.cluster.runtime.recovery import get, is_loss, raise_if_refused, reason

_LOG = logging.getLogger(__name__)
# Environment variable with the seconds that an actor waits for a node with GPUs or memory to return.
WAIT_VARIABLE = "HASTEN_NODE_WAIT_SECONDS"
_WAIT_SECONDS = 600.0
_LOG_SECONDS = 30.0
# Other jobs may use the remaining CPUs: a replacement waits for free ones for this long, and then shares.
_CPU_SECONDS = 60.0
_POLL_SECONDS = 0.5
# lost() waits for answers of busy actors for this long, because an actor answers only after its current call. After the
# first loss it waits only for the grace period: Ray reports all actors of a lost node within a second.
_ANSWER_SECONDS = 30.0
_GRACE_SECONDS = 1.0


class Wait:
    """A wait for a node with room for `name`: logged every 30 seconds, and an error after ten minutes.

    The environment variable HASTEN_NODE_WAIT_SECONDS sets another limit.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._since = self._logged = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the wait."""
        return time.monotonic() - self._since

    def go_on(self, needed: str) -> None:
        """Log the needed resources every 30 seconds; UserError once the limit has passed."""
        limit = float(os.environ.get(WAIT_VARIABLE) or _WAIT_SECONDS)
        if self.seconds >= limit:
            raise UserError(
                f"{self._name} needs {needed}, which no node has had for {limit:g} s since one was lost: start such a "
                f"node and run the same command again, finished work is kept; {WAIT_VARIABLE} sets the limit"
            )
        if time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            _LOG.warning(
                "%s waits for a node with %s (%.0f of at most %.0f s)", self._name, needed, self.seconds, limit
            )


def _nothing() -> None:
    """Body of the probe task, which Ray runs once the resources are free."""


class PendingReplacement:
    """A replacement that waits for resources.

    probe: a task that requests the same resources, and ends once they are free. cpus: CPUs that it requests.
    """

    def __init__(self, name: str) -> None:
        self.wait = Wait(name)
        self.probe: ObjectRef | None = None
        self.cpus: float | None = None


class ActorPool:
    """A pool of equal actors, each of which is replaced after a loss.

    name: of one actor, in messages. needs: resources of each. start(index, cpus): starts an actor that requests this
    many CPUs; the actor must have a method `usage`. A replacement requests no CPUs, and shares those of others, if the
    remaining nodes do not have as many; for GPUs and memory it waits, see Wait. While it waits, its item of `actors` is
    None. restarts: number of replacements so far.
    """

    def __init__(
        self, name: str, count: int, needs: ActorResources, start: Callable[[int, float], ActorHandle]
    ) -> None:
        self.name = name
        self._count, self._needs, self._start = count, needs, start
        # Any, because a type checker does not know the methods of actor handles.
        self.actors: list[Any] = []
        self.restarts = 0
        self._pending: dict[int, PendingReplacement] = {}
        # CPUs of each actor, and the nodes that were alive when it was started.
        self._places: dict[int, tuple[float, frozenset[str]]] = {}
        # First calls of actors that may not have been placed yet.
        self._starting: dict[int, ObjectRef] = {}
        self._polled = 0.0

    def begin(self, fits: bool | None = None) -> None:
        """Start the actors, unless they are started.

        fits: whether the cluster has room for all of them and for the actors that are started with them, or grows until
        it has; None checks for these actors alone. If not, as after a loss, each waits like a replacement, see fill().
        """
        if self.actors:
            return
        self.actors = [None] * self._count
        if fits is None:
            fits = self._fits(self._count, self._needs.cpus) or grows()
        for index in range(self._count):
            if fits:
                self._start_actor(index, self._needs.cpus)
            else:
                self._pending[index] = PendingReplacement(self.name)

    @property
    def members(self) -> list[Any]:
        """Processes that can be given work: here the actors. None for those of an actor that waits."""
        return self.actors

    @property
    def alive(self) -> list[int]:
        """Indices of the actors that are not waiting for a replacement."""
        return [index for index, actor in enumerate(self.actors) if actor is not None]

    def replace(self, index: int, error: BaseException | None = None) -> None:
        """End an actor; its replacement starts now or, once there is room, in poll(). error: the error of its loss."""
        if index in self._pending:
            return
        if error is not None:
            _LOG.warning("lost %s (%s); starting a replacement", self.name, reason(error))
        self._stop(index)
        self.actors[index] = None
        self._starting.pop(index, None)
        self.restarts += 1
        cpus, known = self._places.pop(index)
        # An unavailable actor may be on a lost node that Ray still lists.
        if known <= node_ids() and not isinstance(error, ActorUnavailableError):
            self._start_actor(index, cpus)
        else:
            self._pending[index] = PendingReplacement(self.name)

    def poll(self) -> bool:
        """Start replacements whose resources are free; returns whether any was started. To be called regularly."""
        now = time.monotonic()
        if now - self._polled < _POLL_SECONDS or not (self._pending or self._starting):
            return False
        self._polled = now
        for index, answer in list(self._starting.items()):
            if ray.wait([answer], timeout=0)[0]:
                del self._starting[index]
            elif not self._places[index][1] <= node_ids():
                # A node was lost before the actor answered. The actor may have been placed on it, and would wait for
                # ever. Killing it makes its calls fail, so that it is replaced.
                del self._starting[index]
                self._stop(index)
        before = len(self._pending)
        for index, pending in list(self._pending.items()):
            cpus = self._place(pending)
            if cpus is not None:
                del self._pending[index]
                self._start_actor(index, cpus)
        return len(self._pending) < before

    def fill(self) -> None:
        """Wait until all replacements are started."""
        while self._pending:
            self.poll()
            time.sleep(_POLL_SECONDS / 2)

    def lost(self) -> dict[int, BaseException]:
        """Lost actors with their errors. Calls all actors, and waits a limited time for busy ones."""
        calls = {process.usage.remote(): index for index in self.alive for process in self._processes(index)}
        lost: dict[int, BaseException] = {}
        until = time.monotonic() + _ANSWER_SECONDS
        while calls and time.monotonic() < until:
            ready, _ = ray.wait(list(calls), timeout=_GRACE_SECONDS)
            for answer in ready:
                index = calls.pop(answer)
                try:
                    ray.get(answer)
                except RayError as error:
                    raise_if_refused(error)
                    lost[index] = error
                    until = min(until, time.monotonic() + _GRACE_SECONDS)
        return lost

    def end(self) -> None:
        """End all actors."""
        for index in self.alive:
            self._stop(index)
        for pending in self._pending.values():
            if pending.probe is not None:
                ray.cancel(pending.probe)
        self.actors, self._pending, self._places, self._starting = [], {}, {}, {}

    def cause(self, error: RayError, index: int | None = None) -> RayError:
        """The error that caused the error of a call to an actor, or to any for None; here they are independent."""
        return error

    def watch(self, calls: Sequence[ObjectRef]) -> None:
        """Nothing: an actor does not wait for others. calls: one of each member."""

    def _processes(self, index: int) -> list[Any]:
        """Processes that are lost together."""
        return [self.actors[index]]

    def _stop(self, index: int) -> None:
        """End an actor."""
        with suppress(RayError):  # raised for an actor that could not be created
            ray.kill(self.actors[index])

    def _start_actor(self, index: int, cpus: float) -> None:
        self._places[index] = cpus, node_ids()
        self.actors[index] = self._start(index, cpus)
        self._starting[index] = self.actors[index].usage.remote()

    def _place(self, pending: PendingReplacement) -> float | None:
        """CPUs that a replacement may request now; None while it has to wait."""
        if pending.probe is not None and ray.wait([pending.probe], timeout=0)[0]:
            probe, pending.probe = pending.probe, None
            try:
                ray.get(probe)
            except RayError as error:
                if not is_loss(error):
                    raise
            else:
                return pending.cpus
        waits = any(self._needs.fixed.values())
        # On a cluster with an autoscaler, the probe below makes it add a node.
        if waits and not (self._fits(1, 0) or grows()):
            pending.wait.go_on(self._needs.fixed_text())
            return None
        cpus = self._needs.cpus if pending.cpus is None else pending.cpus
        late = pending.wait.seconds >= _CPU_SECONDS and not waits
        if cpus and (late or not (self._fits(1 if waits else self._count, cpus) or grows())):
            _LOG.warning(
                "the replacement of %s has no CPUs of its own: all %d actors share the remaining %g CPUs",
                self.name,
                self._count,
                ray.cluster_resources().get("CPU", 0),
            )
            cpus = 0.0
            if pending.probe is not None:
                ray.cancel(pending.probe)
                pending.probe = None
        if not cpus and not waits:
            return cpus
        if pending.probe is None:
            # A waiting actor looks like one that is starting; whether a trivial task has run can be seen.
            task = ray.remote(_nothing).options(num_cpus=cpus, num_gpus=self._needs.gpus, memory=self._needs.memory)
            pending.probe, pending.cpus = task.remote(), cpus
        elif waits:
            pending.wait.go_on(self._needs.fixed_text("free"))
        return None

    def _fits(self, count: int, cpus: float) -> bool:
        """Whether `count` actors with these CPUs would fit on the nodes that are alive, if nothing else ran there."""
        return packs(nodes(), [{"CPU": cpus, **self._needs.fixed}] * count)


def wait(pools: Iterable[ActorPool], references: Sequence[Any], seconds: float | None = None) -> list[Any]:
    """Ready references; replacements are started meanwhile.

    Returns an empty list after `seconds` (None waits without limit), or when a replacement was started.
    """
    pools = list(pools)
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        timeout = _POLL_SECONDS if until is None else max(0.0, min(_POLL_SECONDS, until - time.monotonic()))
        ready: list[Any] = []
        if references:
            ready, _ = ray.wait(list(references), num_returns=1, timeout=timeout)
        else:
            time.sleep(timeout)
        replaced = [pool for pool in pools if pool.poll()]
        if ready or replaced or (until is not None and time.monotonic() >= until):
            return ready


def wait_for_all(pools: Iterable[ActorPool], references: Sequence[ObjectRef]) -> None:
    """Return once all calls have ended; raises the first error. A UserError of an actor is raised unwrapped."""
    pools, unfinished = list(pools), list(references)
    while unfinished:
        for reference in wait(pools, unfinished):
            get(reference)
            unfinished.remove(reference)


def start_actor(kind: type, options: Mapping[str, Any], *arguments: object) -> ActorHandle:
    """A new actor of a class, with options of Ray."""
    return cast(ActorHandle, ray.remote(kind).options(**options).remote(*arguments))


def node_ids() -> frozenset[str]:
    """Ray's ids of the nodes that are alive."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
