"""Requests to an autoscaler for work that waits: placement groups in which nothing will run.

A cluster with an autoscaler adds nodes for what Ray could not place. Points of a sweep are submitted only when there
is room for them, so Ray does not know of those that wait. A group that is not placed yet counts as they would, with all
its bundles at once. It is removed with its driver, however that ends, so that no node is kept for a killed driver.
"""

from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup

# The autoscaler packs all requests in every cycle.
_MOST = 64


class Demand:
    """Requests of resources for several equal pieces of work; used inside a Ray session."""

    def __init__(self) -> None:
        self._bundles: list[dict[str, float]] = []
        self._groups: list[PlacementGroup] = []

    def ask(self, bundles: Sequence[Mapping[str, float]], count: int) -> None:
        """Request `count` times these bundles instead of what was requested before; to be called every now and then."""
        wanted = [dict(bundle) for bundle in bundles]
        if wanted != self._bundles:
            self.end()
            self._bundles = wanted
        # A group that was placed has served its purpose, and would take the resources from the work itself.
        found = ray.util.placement_group_table() if self._groups else {}
        placed = [group for group in self._groups if found.get(group.id.hex(), {}).get("state") == "CREATED"]
        self._remove(placed)
        self._remove(self._groups[count:])
        for _ in range(min(count, _MOST) - len(self._groups) - len(placed)):
            self._groups.append(ray.util.placement_group(wanted, strategy="PACK"))

    def end(self) -> None:
        """Withdraw all requests."""
        self._remove(list(self._groups))

    def _remove(self, groups: Sequence[PlacementGroup]) -> None:
        for group in groups:
            self._groups.remove(group)
            ray.util.remove_placement_group(group)
