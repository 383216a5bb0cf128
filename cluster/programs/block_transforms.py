"""Transforms on a cluster: calibrators collect statistics of the uncompressed block and solve the transforms' parts.

The edits of a block are one small file, written before the block's layers are solved: a resumed run reads it.
"""

from collections.abc import Callable, Mapping, Sequence

from ray import ObjectRef, put
from ray.actor import ActorHandle

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.settings import Task
from hasten.accel.compression.transforms.base import Part
from hasten.accel.compression.transforms.edits import Edits
from hasten.cluster.programs.calibration_work import CollectedSums, SolveWorkload, Step, Unit
from hasten.cluster.runtime.actor_pool import ActorPool
from hasten.cluster.runtime.dispatcher import Dispatcher, SharedQueue
from hasten.cluster.runtime.resources import release_memory


class TransformWorkload(SolveWorkload[list[Edits]]):
    """Parts of one transform of a block, solved by idle calibrators."""

    def __init__(self, pool: ActorPool, sums: CollectedSums, ranks: int = 1) -> None:
        super().__init__(pool, sums, ranks)
        self._number = 0
        self._edits: ObjectRef | None = None

    def begin_transform(self, step: Step, number: int, edits: ObjectRef, costs: Mapping[Unit, float]) -> None:
        """Set the transform, the edits of earlier ones, and the costs of the units."""
        self.begin(step, costs)
        self._number, self._edits = number, edits

    def submit(self, worker: int, keys: Sequence[Unit]) -> ActorHandle:
        """Start a solve."""
        (unit,) = keys
        calibrator, sums = self.pool.members[worker], self._sums.of(self._step)
        return calibrator.transform.remote(self._step[0], self._number, list(unit), self._edits, *sums)


class TransformProgram:
    """Makes the edits of blocks. ranks: number of calibrators that are one actor of the pool."""

    def __init__(self, task: Task, pool: ActorPool, sums: CollectedSums, ranks: int) -> None:
        self._task, self._pool, self._sums = task, pool, sums
        self._work = TransformWorkload(pool, sums, ranks)
        self._dispatcher = Dispatcher(self._work)

    @property
    def is_finished(self) -> bool:
        """Whether the edits of all blocks are written."""
        sequence = self._task.transforms
        return sequence is None or not sequence.unfinished(self._task.architecture.num_blocks - 1)

    def run(self, block: int) -> None:
        """Write the edits of a block, and of blocks before it that have none yet."""
        sequence = self._task.transforms
        if sequence is None:
            return
        # Output layer and embedding come behind the last block.
        for number in sequence.unfinished(min(block, self._task.architecture.num_blocks - 1)):
            sequence.write(self._task.architecture, number, self._collect(number), self._solve(number))
            for place in range(len(sequence.transforms)):
                self._sums.finish(self._step(number, place))
            release_memory()

    def reset(self) -> None:
        """Forget what is in progress."""
        self._dispatcher.reset()

    def _step(self, block: int, number: int) -> Step:
        """Steps of transforms are before the first stage of their block."""
        assert self._task.transforms is not None
        return block, number - len(self._task.transforms.transforms)

    def _collect(self, block: int) -> Callable[[int, list[str], Edits], Step]:
        groups = {group.key: group for group in self._task.layer_groups[block]} if block >= 0 else {}

        def collect(number: int, keys: list[str], edits: Edits) -> Step:
            step = self._step(block, number)
            self._sums.begin(step)
            wanted: list[Group] = [groups[key] for key in keys]
            self._pool.watch(self._sums.request(step, wanted, [put(edits)], self._pool.members))
            return step

        return collect

    def _solve(self, block: int) -> Callable[[int, Sequence[Part], Edits, Edits, Step | None], dict[str, Edits]]:
        def solve(
            number: int, parts: Sequence[Part], collected: Edits, edits: Edits, statistics: Step | None
        ) -> dict[str, Edits]:
            # Without statistics there is a step, too, of which no sums were requested.
            step = statistics or self._step(block, number)
            units: dict[Unit, float] = {
                (part.key,): part.cost for part in sorted(parts, key=lambda part: (-part.cost, part.key))
            }
            self._work.begin_transform(step, number, put((collected, edits)), units)
            solved: dict[str, Edits] = {}
            for unit, (made,) in self._dispatcher.run(units, SharedQueue(units)):
                self._work.solved(unit)
                solved[unit[0]] = made
            return solved

        return solve
