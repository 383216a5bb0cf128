"""Parts of an evaluation as a workload of process groups, whose ranks hold parts of every block."""

from collections.abc import Iterator, Sequence

from ray import ObjectRef
from ray.exceptions import RayError

from hasten.accel.evaluation.divergence import Sums
from hasten.accel.evaluation.perplexity import Windows
from hasten.cluster.actors.rank_evaluator import EvaluatorSpec, Measured, RankEvaluator
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.dispatcher import Assignment, Dispatcher, PoolWorkload, SharedQueue
from hasten.cluster.runtime.group_pool import GroupPool
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.process_group import ProcessGroup
from hasten.cluster.runtime.recovery import Batches


def group_results(
    spec: EvaluatorSpec, parts: Sequence[Windows], needs: ActorResources, batches: Batches
) -> Iterator[tuple[int, Measured]]:
    """(number, result) of each part of the windows, each evaluated by a group; inside a Ray session.

    needs: resources of each rank. batches: windows that run at once, by number of the part.
    """
    work = _EvaluationWorkload(spec, parts, needs, batches)
    work.pool.begin()
    try:
        yield from Dispatcher(work).run(range(len(parts)), SharedQueue(range(len(parts))))
    finally:
        work.pool.end()


class _EvaluationWorkload(PoolWorkload[int, Measured]):
    """Parts by number. An assignment is one part, and its handle the call to the group's first rank."""

    def __init__(self, spec: EvaluatorSpec, parts: Sequence[Windows], needs: ActorResources, batches: Batches) -> None:
        self._groups = GroupPool("a target group", len(parts), spec.division.size, needs, self._start)
        super().__init__(self._groups)
        self._spec, self._parts, self._needs, self._batches = spec, parts, needs, batches
        self._calls: dict[int, tuple[ProcessGroup, list[ObjectRef]]] = {}

    def submit(self, worker: int, keys: Sequence[int]) -> object:
        """Start a part."""
        (part,) = keys
        group = self._groups.groups[worker]
        calls = [rank.evaluate.remote(self._parts[part], self._batches.of(part)) for rank in group.ranks]
        group.watch(calls, endless=False)
        self._calls[worker] = group, calls
        return calls[0]

    def receive(self, assignment: Assignment[int]) -> tuple[Sequence[tuple[int, Measured]], bool]:
        """The sum of the ranks' results, in their order."""
        if not assignment.keys:
            return [], True
        (part,) = assignment.keys
        group, calls = self._calls[assignment.worker]
        results: list[Measured] = group.results(calls)
        total = Measured(
            sum((result.sums for result in results), Sums()),
            sum(result.cpu_seconds for result in results),
            max(result.peak_rss_bytes for result in results),
        )
        return [(part, total)], True

    def recover(self, worker: int, keys: Sequence[int], error: RayError) -> None:
        """Replace a group that was lost or ran out of memory."""
        recovery.raise_if_refused(error)
        out_of_memory = recovery.is_out_of_memory(error)
        if out_of_memory:
            for part in keys:
                self._batches.halve(part, self.name)
        elif not recovery.is_loss(error):
            raise error
        self.pool.replace(worker, None if out_of_memory else error)

    def _start(self, worker: int, cpus: float) -> ProcessGroup:
        size, device = self._spec.division.size, self._spec.device
        return ProcessGroup(RankEvaluator, size, self._needs, [self._spec], device, self.name, cpus)
