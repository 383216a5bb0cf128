"""A pool of process groups, each of which is replaced as a whole after a loss."""

from collections.abc import Callable

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
        self._size, self._start_ranks = size, start
        self.groups: dict[int, ProcessGroup] = {}

    def cause(self, error: RayError) -> RayError:
        """The error of a lost rank, or of one without memory, because of which another rank failed; else `error`."""
        for group in self.groups.values():
            cause = group.cause(error)
            if cause is not error:
                return cause
        return error

    def _start_group(self, index: int, cpus: float) -> ActorHandle:
        self.groups[index] = self._start_ranks(index, cpus / self._size)
        first: ActorHandle = self.groups[index].ranks[0]
        return first

    def _stop(self, index: int) -> None:
        self.groups.pop(index).close()
