"""Requests resources of an autoscaler for waiting work, with placement groups in which nothing will run.

An autoscaler adds nodes for what Ray could not place. Points of a sweep are submitted only when there is room for them,
so Ray does not know of the waiting ones. A placement group that is not placed yet represents a waiting point, with all
its bundles. Ray removes it with its driver, however that ends, so that no node is kept for a killed driver.
"""

from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup

# Largest number of requests, because the autoscaler packs all of them in every cycle.
_MAX_GROUPS = 64


class Demand:
    """Requests of resources for several equal items of work; used inside a Ray session."""

    def __init__(self) -> None:
        self._bundles: list[dict[str, float]] = []
        self._groups: list[PlacementGroup] = []

    def ask(self, bundles: Sequence[Mapping[str, float]], count: int) -> None:
        """Request `count` times these bundles, in place of earlier requests; to be called regularly."""
        requested = [dict(bundle) for bundle in bundles]
        if requested != self._bundles:
            self.end()
            self._bundles = requested
        # A group that was placed is not needed any more, and would take the resources from the work itself.
        states = ray.util.placement_group_table() if self._groups else {}
        placed = [group for group in self._groups if states.get(group.id.hex(), {}).get("state") == "CREATED"]
        self._remove(placed)
        self._remove(self._groups[count:])
        for _ in range(min(count, _MAX_GROUPS) - len(self._groups) - len(placed)):
            self._groups.append(ray.util.placement_group(requested, strategy="PACK"))

    def end(self) -> None:
        """Withdraw all requests."""
        self._remove(list(self._groups))

    def _remove(self, groups: Sequence[PlacementGroup]) -> None:
        for group in groups:
            self._groups.remove(group)
            ray.util.remove_placement_group(group)
