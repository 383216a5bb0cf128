"""What calibrators compute of a block: sums over their own sequences, and then layer groups, whoever is free."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import ActorPool
from hasten.cluster.runtime.dispatcher import PoolWorkload

# Keys of the layer groups that one call solves.
Unit = tuple[str, ...]
# One row of a block's or a layer's report.
Facts = dict[str, Any]
# What a call returns: packed tensors by layer, one row of facts a layer, and the wall seconds that it took.
Solution = tuple[dict[str, dict[str, Tensor]], list[Facts], float]


class CollectedSums:
    """References to the sums of layer inputs that calibrators collect, one of each calibrator, by block.

    A calibrator's sums are lost with it: its replacement is asked for the same ones as it starts.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[ObjectRef]] = {}
        self._keys: dict[int, list[str]] = {}
        # Of the current block, by calibrator, those of replacements: needed only if their predecessors' are lost.
        self._replacements: dict[int, ObjectRef] = {}
        self._block = -1

    def begin(self, block: int) -> None:
        """A block becomes the current one."""
        self._block = block

    def request(self, block: int, groups: Sequence[Group], calibrators: Sequence[ActorHandle]) -> None:
        """Ask all calibrators for the sums of some groups, unless they have been asked for this block."""
        if block not in self._sums:
            # The same groups for all, whenever each of them comes to it.
            self._keys[block] = [group.key for group in groups]
            self._sums[block] = [calibrator.collect.remote(block, self._keys[block]) for calibrator in calibrators]

    def request_again(self, index: int, calibrator: ActorHandle) -> None:
        """Ask the replacement of a calibrator for what its predecessor was asked for."""
        for block in sorted(self._sums):
            sums: ObjectRef = calibrator.collect.remote(block, self._keys[block])
            if block == self._block:
                self._replacements[index] = sums
            else:
                self._sums[block][index] = sums

    def of(self, block: int) -> list[ObjectRef]:
        """Sums of a block, by calibrator; empty where no statistics are needed."""
        return self._sums.get(block, [])

    def recover(self) -> None:
        """After a loss, use the replacements' sums of the current block; without any, all are collected again."""
        if self._replacements and self._block in self._sums:
            for index, sums in self._replacements.items():
                self._sums[self._block][index] = sums
            self._replacements.clear()
        else:
            # It is not known whose sums are lost.
            self._sums.clear()

    def finish(self, block: int) -> None:
        """Free a block's sums in the object store, whose room the next block's may need."""
        self._sums.pop(block, None)
        self._replacements.clear()

    def clear(self) -> None:
        """Free all."""
        self._sums.clear()
        self._replacements.clear()


class SolveWorkload(PoolWorkload[Unit, Solution]):
    """Layer groups of one block, solved by whichever calibrator is free.

    Two calibrators that solve the same groups compute the same bits, and until their files are complete each writes to
    names of its own.
    """

    def __init__(self, pool: ActorPool, sums: CollectedSums) -> None:
        super().__init__(pool)
        self._sums = sums
        self._block = -1
        self._costs: Mapping[Unit, float] = {}
        # Largest cost that was solved: more expensive units may well take longer.
        self._max_cost = 0.0

    def begin(self, block: int, costs: Mapping[Unit, float]) -> None:
        """A block and the costs of its units."""
        self._block, self._costs = block, costs

    def submit(self, worker: int, keys: Sequence[Unit]) -> ActorHandle:
        """A solve."""
        (unit,) = keys
        return self.pool.actors[worker].solve.remote(self._block, list(unit), *self._sums.of(self._block))

    def solved(self, unit: Unit) -> None:
        """A unit's result is there."""
        self._max_cost = max(self._max_cost, self._costs[unit])

    def recover(self, worker: int, keys: Sequence[Unit], error: RayError) -> None:
        """Replace a lost calibrator; all other losses, and out of memory, concern the whole pass."""
        if recovery.is_out_of_memory(error) or not (recovery.is_actors_own(error) and recovery.is_loss(error)):
            raise error
        self.pool.replace(worker, error)

    def is_repeatable(self, key: Unit) -> bool:
        """Whether the unit costs no more than one that was solved."""
        return self._costs[key] <= self._max_cost
