"""Shared drafters: actors that each serve several verifiers, with snapshots of what they have learned."""

import time
from collections.abc import Callable, Mapping

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import Tensor

from hasten.accel.decoding.drafters.base import Drafter
from hasten.cluster.actors.drafter import Address, DrafterActor, Snapshot
from hasten.cluster.actors.remote_drafter import PATIENCE_SECONDS
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import ActorPool, start_actor
from hasten.cluster.runtime.placement import ActorResources

Learned = Mapping[str, Tensor]
Parts = tuple[Learned, ...]  # what was learned at some time, and later changes in their order
_POLL_SECONDS = 0.5


class SharedDrafters:
    """Actors of one drafter, with snapshots of what each has learned, from which its replacement starts.

    name: unique in the cluster. make_memory(parts): returns the function that builds the memory in the actor.
    snapshot_seconds: interval between snapshots, longer where they take much time.
    """

    def __init__(
        self,
        name: str,
        drafter: Drafter | None,
        count: int,
        needs: ActorResources,
        make_memory: Callable[[Parts], Callable[[], object]],
        learned: Learned | None,
        snapshot_seconds: float,
    ) -> None:
        self._drafter, self._make_memory, self._needs = drafter, make_memory, needs
        self._addresses = [Address(f"{name}-{number}") for number in range(count)]
        self._learned: list[Parts] = [(learned,) if learned else ()] * count
        self._snapshot_seconds = snapshot_seconds
        self._snapshots: dict[int, ObjectRef] = {}
        self._polled = 0.0
        self.pool = ActorPool("a drafter", count, needs, self._start)

    def address(self, verifier: int) -> Address:
        """Address of a verifier's drafter."""
        return self._addresses[verifier % len(self._addresses)]

    def renew_addresses(self) -> None:
        """Give new names to the next actors, after all current ones were ended."""
        self._addresses = [address.replacement() for address in self._addresses]

    def poll(self) -> None:
        """Replace lost drafters and request snapshots from the others; to be called regularly."""
        now = time.monotonic()
        if now - self._polled < _POLL_SECONDS:
            return
        self._polled = now
        for number in self.pool.alive:
            snapshot = self._snapshots.pop(number, None)
            if snapshot is not None:
                if not ray.wait([snapshot], timeout=0)[0]:
                    self._snapshots[number] = snapshot
                    continue
                try:
                    self._add(number, recovery.get(snapshot))
                except RayError as error:
                    recovery.raise_if_refused(error)
                    if not recovery.is_loss(error):
                        raise
                    self._addresses[number] = self._addresses[number].replacement()
                    self.pool.replace(number, error)
                    continue
            self._snapshots[number] = self.pool.actors[number].snapshot.remote(self._snapshot_seconds)

    def learned(self) -> Learned:
        """What the first drafter has learned; that of its snapshots if it is lost or unresponsive."""
        actor = self.pool.actors[0]
        try:
            call = actor.learned.remote() if actor else None
            responds = call is not None and ray.wait([call], timeout=PATIENCE_SECONDS)[0]
            if responds:
                # Later snapshots may hold changes that are in here already: to add them again changes nothing.
                learned: Learned = recovery.get(call)
                self._learned[0] = (learned,) if learned else ()
                return learned
        except RayError as error:
            recovery.raise_unless_lost(error)
        assert self._drafter is not None
        return self._drafter.saved(self._make_memory(self._learned[0])()) if self._learned[0] else {}

    def _add(self, number: int, snapshot: Snapshot | None) -> None:
        """Keep a drafter's snapshot; None if it has learned nothing since the last one."""
        if snapshot is not None:
            earlier = () if snapshot.whole else self._learned[number]
            self._learned[number] = (*earlier, snapshot.tensors)

    def forget(self, client: str) -> None:
        """Free the sequences of a verifier that was lost, in all drafters."""
        for number in self.pool.alive:
            self.pool.actors[number].forget.remote(client)

    def end(self) -> None:
        """End the actors."""
        self.pool.end()
        self._snapshots = {}

    def _start(self, number: int, cpus: float) -> ActorHandle:
        assert self._drafter is not None
        options = {"name": self._addresses[number].actor, **self._needs.options(cpus, threads=1)}
        return start_actor(DrafterActor, options, self._drafter, self._make_memory(self._learned[number]))
