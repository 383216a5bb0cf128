"""A pool of process groups, each of which is replaced as a whole after a loss."""

from collections.abc import Callable, Sequence
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError

from hasten.cluster.runtime.actor_pool import ActorPool
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.process_group import ProcessGroup, group_needs


class GroupPool(ActorPool):
    """An ActorPool whose actors are the first ranks of groups of `size` ranks.

    needs: resources of each rank. start(index, cpus): starts a group, each rank of which requests this many CPUs.
    """

    def __init__(
        self, name: str, count: int, size: int, needs: ActorResources, start: Callable[[int, float], ProcessGroup]
    ) -> None:
        super().__init__(name, count, group_needs(size, needs), self._start_group)
        self.size, self._start_ranks = size, start
        self.groups: dict[int, ProcessGroup] = {}

    @property
    def members(self) -> list[Any]:
        """All ranks, of one group after another, where each is given work of its own. None for those that wait."""
        ranks: list[Any] = []
        for index, first in enumerate(self.actors):
            ranks += [None] * self.size if first is None else self.groups[index].ranks
        return ranks

    def watch(self, calls: Sequence[ObjectRef]) -> None:
        """End a group as soon as a call to one of its ranks fails. calls: one of each member."""
        for index, group in self.groups.items():
            group.watch(calls[index * self.size : (index + 1) * self.size], endless=False)

    def cause(self, error: RayError, index: int | None = None) -> RayError:
        """The error of a lost rank, or of one without memory, because of which another rank failed; else `error`."""
        for group in [self.groups.get(index)] if index is not None else list(self.groups.values()):
            cause = error if group is None else group.cause(error)
            if cause is not error:
                return cause
        return error

    def _start_group(self, index: int, cpus: float) -> ActorHandle:
        self.groups[index] = self._start_ranks(index, cpus / self.size)
        first: ActorHandle = self.groups[index].ranks[0]
        return first

    def _processes(self, index: int) -> list[Any]:
        return self.groups[index].ranks

    def _stop(self, index: int) -> None:
        group = self.groups.pop(index, None)  # None: poll() has ended it, and now it is replaced
        if group is not None:
            group.close()
