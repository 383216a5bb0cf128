"""The work of calibrators on a block: sums over their own sequences, then layer groups, solved by idle calibrators."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import ActorPool
from hasten.cluster.runtime.dispatcher import PoolWorkload

# A block, and the stage of it whose groups are compressed at the same time.
Step = tuple[int, int]
# Keys of the layer groups that one call solves.
Unit = tuple[str, ...]
# One row of a block's or a layer's report.
Facts = dict[str, Any]
R = TypeVar("R")
# What a solve returns: packed tensors by layer, one row of facts for each layer, and the wall seconds.
Solution = tuple[dict[str, dict[str, Tensor]], list[Facts], float]


class CollectedSums:
    """References to the sums of layer inputs that calibrators collect: for each step, one of each calibrator.

    A calibrator's sums are lost with it, so its replacement is asked for the same ones when it starts.
    """

    def __init__(self) -> None:
        self._sums: dict[Step, list[ObjectRef]] = {}
        # Keys of the groups, and the packed layers of the block's earlier stages.
        self._arguments: dict[Step, tuple[list[str], list[ObjectRef | list[ObjectRef]]]] = {}
        # Sums of the current step by replacements; used only if those of their predecessors are lost.
        self._replacements: dict[int, ObjectRef] = {}
        self._step: Step = (-1, 0)

    def begin(self, step: Step) -> None:
        """Make a step the current one."""
        self._step = step

    def request(
        self,
        step: Step,
        groups: Sequence[Group],
        solved: Sequence[ObjectRef | list[ObjectRef]],
        calibrators: Sequence[ActorHandle],
    ) -> list[ObjectRef]:
        """Request the sums of some groups from all calibrators, unless this step was requested before.

        solved: packed layers of the earlier stages of the block. Returns the new calls, one of each calibrator or none.
        """
        if step in self._sums:
            return []
        # The keys are fixed here, so that all calibrators collect the same groups.
        self._arguments[step] = ([group.key for group in groups], list(solved))
        self._sums[step] = [self._ask(calibrator, step) for calibrator in calibrators]
        return list(self._sums[step])

    def request_again(self, index: int, calibrator: ActorHandle) -> list[ObjectRef]:
        """Send the requests of a lost calibrator to its replacement; returns the calls."""
        calls = []
        for step in sorted(self._sums):
            sums = self._ask(calibrator, step)
            calls.append(sums)
            if step == self._step:
                self._replacements[index] = sums
            else:
                self._sums[step][index] = sums
        return calls

    def of(self, step: Step) -> list[ObjectRef]:
        """Sums of a step, one reference for each calibrator; empty if no statistics are needed."""
        return self._sums.get(step, [])

    def recover(self) -> None:
        """After a loss, use the replacements' sums of the current step; if there are none, drop all sums."""
        if self._replacements and self._step in self._sums:
            for index, sums in self._replacements.items():
                self._sums[self._step][index] = sums
            self._replacements.clear()
        else:
            # It is unknown which sums are lost: all are collected again.
            self._sums.clear()

    def finish(self, step: Step) -> None:
        """Free a step's sums in the object store, to make room for those of the next one."""
        self._sums.pop(step, None)
        self._replacements.clear()

    def clear(self) -> None:
        """Free all sums."""
        self._sums.clear()
        self._replacements.clear()

    def _ask(self, calibrator: ActorHandle, step: Step) -> ObjectRef:
        (block, stage), (keys, solved) = step, self._arguments[step]
        sums: ObjectRef = calibrator.collect.remote(block, keys, stage, *solved)
        return sums


class SolveWorkload(PoolWorkload[Unit, R], Generic[R]):
    """Layer groups of one block, solved by idle calibrators: by all ranks of groups, each by itself.

    Two calibrators that solve the same groups compute the same bits, and write to different names until their files
    are complete. ranks: number of calibrators that are one actor of the pool.
    """

    def __init__(self, pool: ActorPool, sums: CollectedSums, ranks: int = 1) -> None:
        super().__init__(pool)
        self._sums, self._ranks = sums, ranks
        self._step: Step = (-1, 0)
        self._costs: Mapping[Unit, float] = {}
        # Largest cost that was solved: a more expensive unit may take longer without being a straggler.
        self._max_cost = 0.0

    def begin(self, step: Step, costs: Mapping[Unit, float]) -> None:
        """Set the step and the costs of its units."""
        self._step, self._costs = step, costs

    def workers(self) -> Sequence[int]:
        """Indices of the calibrators that are alive."""
        return [index for index, calibrator in enumerate(self.pool.members) if calibrator is not None]

    def owner(self, worker: int) -> object:
        """The calibrator."""
        members = self.pool.members
        return members[worker] if members else None

    def submit(self, worker: int, keys: Sequence[Unit]) -> ActorHandle:
        """Start a solve."""
        (unit,) = keys
        return self.pool.members[worker].solve.remote(self._step[0], list(unit), *self._sums.of(self._step))

    def solved(self, unit: Unit) -> None:
        """Note that a unit was solved."""
        self._max_cost = max(self._max_cost, self._costs[unit])

    def recover(self, worker: int, keys: Sequence[Unit], error: RayError) -> None:
        """Replace a lost calibrator; re-raise other losses and out of memory, which the whole pass must handle."""
        cause = self.pool.cause(error)
        own = cause is error and recovery.is_actors_own(error) and recovery.is_loss(error)
        if recovery.is_out_of_memory(cause) or not own:
            raise cause
        self.pool.replace(worker // self._ranks, error)

    def is_repeatable(self, key: Unit) -> bool:
        """Whether the unit costs no more than one that was solved."""
        return self._costs[key] <= self._max_cost
