"""What an autoscaler is told of work that waits for room: placement groups that nothing will run in.

A cluster that grows adds nodes for what Ray could not place. Points of a sweep are handed to Ray when there is room for
them, so of those that wait Ray knows nothing. A group that is not placed yet counts as they would, all its bundles at
once, and goes with its driver, however that ends, so that no node is kept for a driver that was killed.
"""

from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup

# The autoscaler packs all of them at every look.
_MOST = 64


class Demand:
    """Room for equal pieces of work, asked for while they wait; used inside a Ray session."""

    def __init__(self) -> None:
        self._bundles: list[dict[str, float]] = []
        self._groups: list[PlacementGroup] = []

    def ask(self, bundles: Sequence[Mapping[str, float]], count: int) -> None:
        """Ask for so many times these bundles, in place of what was asked before; to be called every now and then."""
        wanted = [dict(bundle) for bundle in bundles]
        if wanted != self._bundles:
            self.end()
            self._bundles = wanted
        # What has found room has done its part, and would keep the work itself from it.
        found = ray.util.placement_group_table() if self._groups else {}
        placed = [group for group in self._groups if found.get(group.id.hex(), {}).get("state") == "CREATED"]
        self._remove(placed)
        self._remove(self._groups[count:])
        for _ in range(min(count, _MOST) - len(self._groups) - len(placed)):
            self._groups.append(ray.util.placement_group(wanted, strategy="PACK"))

    def end(self) -> None:
        """Ask for nothing any more."""
        self._remove(list(self._groups))

    def _remove(self, groups: Sequence[PlacementGroup]) -> None:
        for group in groups:
            self._groups.remove(group)
            ray.util.remove_placement_group(group)
