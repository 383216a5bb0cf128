"""Actors of one kind, each of which is replaced after a loss, on the nodes that are left.

The CPUs of a lost node are gone: replacements that find none of their own share those of others, and wait for GPUs.
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
# Environment variable: how many seconds an actor waits for a node with GPUs to come back.
WAIT_VARIABLE = "HASTEN_NODE_WAIT_SECONDS"
_WAIT_SECONDS = 600.0
_LOG_SECONDS = 30.0
# Other jobs may have taken the CPUs of a lost node: an actor waits so long for free ones, and then shares.
_CPU_SECONDS = 60.0
_POLL_SECONDS = 0.5
# A busy actor answers only after its call: so long it is not known to be alive. All actors of a lost node are reported
# within a second of each other.
_ANSWER_SECONDS = 30.0
_GRACE_SECONDS = 1.0


class Wait:
    """A wait for a node that can hold `name`: logged every 30 seconds, and given up after ten minutes.

    The environment variable HASTEN_NODE_WAIT_SECONDS sets another limit.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._since = self._logged = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._since

    def go_on(self, needed: str) -> None:
        """Log now and then what is waited for; UserError once the limit has passed."""
        limit = float(os.environ.get(WAIT_VARIABLE) or _WAIT_SECONDS)
        if self.seconds >= limit:
            raise UserError(
                f"{self._name} needs {needed}, which no node has had for {limit:g} s since one was lost: start a node "
                f"that has and run the same command again, what is finished is kept; {WAIT_VARIABLE} sets the limit"
            )
        if time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            _LOG.warning(
                "%s waits for a node with %s (%.0f of at most %.0f s)", self._name, needed, self.seconds, limit
            )


def _nothing() -> None:
    """The task that tests whether a place is free."""


class PendingReplacement:
    """An actor that was lost and whose replacement has no place yet.

    probe: a task that asks for the same resources, and ends once they are free; cpus: what it asks for.
    """

    def __init__(self, name: str) -> None:
        self.wait = Wait(name)
        self.probe: ObjectRef | None = None
        self.cpus: float | None = None


class ActorPool:
    """Actors of one kind, each of which is replaced after a loss.

    start(index, cpus): makes one that asks for so many CPUs; it has a method `usage`. name: of one, in messages.
    needs: of each. A replacement whose CPUs the nodes that are left do not have asks for none and shares those of
    others; for GPUs and memory it waits, see Wait. Until it has a place, it is None among the actors.
    restarts: replacements so far.
    """

    def __init__(
        self, name: str, count: int, needs: ActorResources, start: Callable[[int, float], ActorHandle]
    ) -> None:
        self.name = name
        self._count, self._needs, self._start = count, needs, start
        # Handles have the methods of their class, which a type checker cannot see.
        self.actors: list[Any] = []
        self.restarts = 0
        self._pending: dict[int, PendingReplacement] = {}
        # CPUs of each actor, and the nodes that were alive when it was started.
        self._places: dict[int, tuple[float, frozenset[str]]] = {}
        # First calls of actors that may still be waiting for their place.
        self._starting: dict[int, ObjectRef] = {}
        self._polled = 0.0

    def begin(self, fits: bool | None = None) -> None:
        """Start the actors, unless they are started.

        fits: whether the cluster holds all of them together with the actors that are started beside them, or grows
        until it does; None finds out. If not, as after a loss, each gets its place as a replacement does, see fill().
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
    def alive(self) -> list[int]:
        """Indices of the actors that are not being replaced."""
        return [index for index, actor in enumerate(self.actors) if actor is not None]

    def replace(self, index: int, error: BaseException | None = None) -> None:
        """End an actor; poll() starts its replacement as soon as there is a place. error: the sign of its loss."""
        if index in self._pending:
            return
        if error is not None:
            _LOG.warning("lost %s (%s); starting another", self.name, reason(error))
        _kill(self.actors[index])
        self.actors[index] = None
        self._starting.pop(index, None)
        self.restarts += 1
        cpus, known = self._places.pop(index)
        # An unavailable actor may be on a node whose loss is not known yet.
        if known <= node_ids() and not isinstance(error, ActorUnavailableError):
            self._start_actor(index, cpus)
        else:
            self._pending[index] = PendingReplacement(self.name)

    def poll(self) -> bool:
        """Start replacements that have found a place; returns whether one has. To be called every now and then."""
        now = time.monotonic()
        if now - self._polled < _POLL_SECONDS or not (self._pending or self._starting):
            return False
        self._polled = now
        for index, answer in list(self._starting.items()):
            if ray.wait([answer], timeout=0)[0]:
                del self._starting[index]
            elif not self._places[index][1] <= node_ids():
                # Its place may have been on the lost node, and it would wait for ever for another one. Once it is
                # killed its calls fail, and it is replaced.
                del self._starting[index]
                _kill(self.actors[index])
        before = len(self._pending)
        for index, pending in list(self._pending.items()):
            cpus = self._place(pending)
            if cpus is not None:
                del self._pending[index]
                self._start_actor(index, cpus)
        return len(self._pending) < before

    def fill(self) -> None:
        """Wait until every actor has a place."""
        while self._pending:
            self.poll()
            time.sleep(_POLL_SECONDS / 2)

    def lost(self) -> dict[int, BaseException]:
        """Actors that are lost, with the error that says so; calls all of them, and waits a while for busy ones."""
        calls = {self.actors[index].usage.remote(): index for index in self.alive}
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
            _kill(self.actors[index])
        for pending in self._pending.values():
            if pending.probe is not None:
                ray.cancel(pending.probe)
        self.actors, self._pending, self._places, self._starting = [], {}, {}, {}

    def _start_actor(self, index: int, cpus: float) -> None:
        self._places[index] = cpus, node_ids()
        self.actors[index] = self._start(index, cpus)
        self._starting[index] = self.actors[index].usage.remote()

    def _place(self, pending: PendingReplacement) -> float | None:
        """CPUs that a replacement may ask for now; None while it has to wait."""
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
        # Where the cluster grows, the probe below is what an autoscaler adds a node for.
        if waits and not (self._fits(1, 0) or grows()):
            pending.wait.go_on(self._needs.fixed_text())
            return None
        cpus = self._needs.cpus if pending.cpus is None else pending.cpus
        late = pending.wait.seconds >= _CPU_SECONDS and not waits
        if cpus and (late or not (self._fits(1 if waits else self._count, cpus) or grows())):
            _LOG.warning(
                "%s that was lost has no CPUs of its own any more: all %d share the %g that are left",
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
            # An actor that waits for a place cannot be told from one that is being made; a task that does nothing can.
            task = ray.remote(_nothing).options(num_cpus=cpus, num_gpus=self._needs.gpus, memory=self._needs.memory)
            pending.probe, pending.cpus = task.remote(), cpus
        elif waits:
            pending.wait.go_on(self._needs.fixed_text("free"))
        return None

    def _fits(self, count: int, cpus: float) -> bool:
        """Whether the nodes that are alive could hold so many actors with so many CPUs, if they were free."""
        return packs(nodes(), [{"CPU": cpus, **self._needs.fixed}] * count)


def wait(pools: Iterable[ActorPool], references: Sequence[Any], seconds: float | None = None) -> list[Any]:
    """What is ready among references, which may be none after so many seconds; replacements are started meanwhile.

    Returns early when a replacement was started. seconds None: waits as long as it takes.
    """
    pools = list(pools)
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        left = _POLL_SECONDS if until is None else max(0.0, min(_POLL_SECONDS, until - time.monotonic()))
        ready: list[Any] = []
        if references:
            ready, _ = ray.wait(list(references), num_returns=1, timeout=left)
        else:
            time.sleep(left)
        replaced = [pool for pool in pools if pool.poll()]
        if ready or replaced or (until is not None and time.monotonic() >= until):
            return ready


def wait_for_all(pools: Iterable[ActorPool], references: Sequence[ObjectRef]) -> None:
    """Return once all calls have ended; raises the first error, a UserError as it was raised in the actor."""
    pools, left = list(pools), list(references)
    while left:
        for reference in wait(pools, left):
            get(reference)
            left.remove(reference)


def start_actor(kind: type, options: Mapping[str, Any], *arguments: object) -> ActorHandle:
    """A new actor of a class, with options of Ray."""
    return cast(ActorHandle, ray.remote(kind).options(**options).remote(*arguments))


def _kill(actor: ActorHandle) -> None:
    with suppress(RayError):  # one that could not be made cannot be ended
        ray.kill(actor)


def node_ids() -> frozenset[str]:
    """Ray's ids of the nodes that are alive."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
