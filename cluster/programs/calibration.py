"""The calibration pass on a cluster: blocks are compressed one after another, and lost calibrators are replaced.

For each stage of a block, every calibrator collects statistics of its shard, and idle calibrators solve the layer
groups; behind the last stage the driver writes the block's file. The replacement of a lost calibrator takes over its
chunks, and only the work in progress is repeated. Solves that are stragglers are re-executed on an idle calibrator.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import TypeVar

from ray import ObjectRef, put
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import Tensor

from hasten.accel.compression.calibration.chunks import chunks_of
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.outer import needs_inputs
from hasten.accel.compression.calibration.settings import Settings, Task
from hasten.accel.compression.calibration.solve import OUTPUT
from hasten.accel.data.packing import is_packed, unpack
from hasten.accel.errors import UserError
from hasten.cluster.actors.calibrator import ATTENTION_KEY, Calibrator
from hasten.cluster.actors.divided_model import Division
from hasten.cluster.actors.rank_calibrator import RankCalibrator
from hasten.cluster.programs.block_transforms import TransformProgram
from hasten.cluster.programs.calibration_work import CollectedSums, Facts, Solution, SolveWorkload, Step, Unit
from hasten.cluster.programs.rotation_learning import RotationProgram
from hasten.cluster.runtime import recovery
from hasten.cluster.runtime.actor_pool import ActorPool, start_actor, wait_for_all
from hasten.cluster.runtime.dispatcher import Dispatcher, SharedQueue
from hasten.cluster.runtime.group_pool import GroupPool
from hasten.cluster.runtime.placement import ActorResources
from hasten.cluster.runtime.process_group import ProcessGroup
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_ATTENTION_UNIT: Unit = (ATTENTION_KEY,)
# Calibration tokens for a column below which errors on other text are clearly larger than those on these tokens.
_FEW = 8
# glibc returns large temporaries to the system as soon as they are freed. By default it raises the first threshold to
# 32 MiB by itself, and holds hundreds of MB after a few blocks. The second threshold keeps small blocks.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 24), "MALLOC_TRIM_THRESHOLD_": str(1 << 26)}


@dataclass
class PassReport:
    """Cost of a pass. seconds: wall time of the blocks computed in this run. cpu_seconds: sum over all processes.

    blocks: one row for each block computed in this run. resumed: number of blocks that were finished before. restarts:
    number of calibrators that were lost and replaced.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0
    resumed: int = 0
    restarts: int = 0
    blocks: list[Facts] = field(default_factory=list)


class CalibrationPass:
    """Runs one compression. tokens: [sequences, T] or packed ones, None if the quantizer needs no statistics.

    needs: resources that each calibrator requests; None is settings.threads CPUs. division: of each worker over the
    ranks of a group, which are calibrators that hold a part of every block; None for whole blocks.
    """

    def __init__(
        self,
        settings: Settings,
        tokens: Tensor | None,
        workers: int,
        needs: ActorResources | None = None,
        division: Division | None = None,
    ) -> None:
        if division is not None:
            _check_division(settings)
        self._settings = settings
        self._task = Task(settings)
        self._needs = needs or ActorResources(settings.threads)
        self._division, self._ranks = division, 1 if division is None else division.size
        self._chunks = chunks_of(settings.shards, tokens, workers, self._ranks)
        self._tokens = 0 if tokens is None else unpack(tokens)[0].numel()
        if tokens is not None and is_packed(tokens):
            self._task.architecture.check_packing()
        self._pool = (
            ActorPool("a calibrator", workers, self._needs, self._start)
            if division is None
            else GroupPool("a group of calibrators", workers, division.size, self._needs, self._start_group)
        )
        self._sums = CollectedSums()
        self._work: SolveWorkload[Solution] = SolveWorkload(self._pool, self._sums, self._ranks)
        self._dispatcher = Dispatcher(self._work)
        self._transforms = TransformProgram(self._task, self._pool, self._sums, self._ranks)
        self._rotation = RotationProgram(self._task, self._pool, tokens)
        self._batches = recovery.Batches(
            "calibration.batch",
            settings.batch,
            # Sequences that wait in the middle of a block hold several times their hidden states.
            f"use {'propagate=quantized, ' * (settings.propagate == 'sequential')}a smaller "
            "calibration.sequence_length, fewer calibration.sequences, or more workers on more nodes",
        )
        self.report = PassReport()
        # Packed layers of the stages of the current block.
        self._stored: dict[Step, ObjectRef] = {}

    @property
    def task(self) -> Task:
        """The driver's own view of checkpoint, layer groups and output."""
        return self._task

    def check_weights(self) -> None:
        """Raise UserError naming a tensor with NaN or Inf; starts the calibrators, which share the reading.

        Nothing is written, so that a damaged checkpoint leaves no files behind.
        """
        before = cpu_seconds()
        self._pool.begin()
        try:
            self._retry(self._check)
        except BaseException:
            self._end()
            raise
        self.report.cpu_seconds += cpu_seconds() - before

    def run(self, progress: Callable[[int, Facts], None] | None = None) -> PassReport:
        """Compute every unfinished block, then write index and config; progress(count, facts) after each block."""
        output, before = self._task.output, cpu_seconds()
        finished = output.finished
        self.report.resumed = len(finished)
        unfinished = [block for block in range(len(self._task.layer_groups)) if block not in finished]
        try:
            if unfinished or not self._transforms.is_finished or not self._rotation.is_finished:
                _warn_of_few(self._tokens, self._task.layer_groups)
                self._run_blocks(unfinished, progress)
            if not output.is_complete:
                output.finish()
            self.report.cpu_seconds += cpu_seconds() - before
            self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, peak_rss_bytes())
            self._add_usage()
        finally:
            self._end()
            output.release()
        return self.report

    def pause(self) -> None:
        """End the calibrators to free their resources; they are started again when they are needed."""
        self._end()

    def _run_blocks(self, blocks: Sequence[int], progress: Callable[[int, Facts], None] | None) -> None:
        self._pool.begin()
        # The start-up is not counted.
        self._retry(lambda: wait_for_all([self._pool], [actor.usage.remote() for actor in self._pool.members]))
        started = perf_counter()
        self._retry(lambda: self._rotation.run(self._settings))
        for count, block in enumerate(blocks, 1):
            row = self._retry(partial(self._run_block, block, {}))
            self.report.blocks.append(row)
            if progress:
                progress(count, row)
        # Blocks without compressed layers may have edits, too.
        self._retry(partial(self._transforms.run, self._task.architecture.num_blocks - 1))
        self.report.seconds = perf_counter() - started

    def _start(self, index: int, cpus: float) -> ActorHandle:
        """Start a calibrator; a replacement gets the same requests for sums as its predecessor."""
        options = self._needs.options(cpus, self._settings.threads, _ALLOCATOR)
        actor = start_actor(Calibrator, options, self._settings, self._chunks[index])
        self._sums.request_again(index, actor)
        return actor

    def _start_group(self, index: int, cpus: float) -> ProcessGroup:
        """Start the ranks of a group; those of a replacement get the same requests as their predecessors."""
        assert self._division is not None
        first = index * self._ranks
        arguments = (self._settings, self._division, self._chunks[first : first + self._ranks])
        device, name = self._settings.device, self._pool.name
        group = ProcessGroup(RankCalibrator, self._ranks, self._needs, arguments, device, name, cpus, _ALLOCATOR)
        calls = [self._sums.request_again(first + rank, actor) for rank, actor in enumerate(group.ranks)]
        group.watch([call for of_rank in calls for call in of_rank], endless=False)
        return group

    def _add_usage(self) -> None:
        """Add the calibrators' CPU time and memory to the report."""
        calls = [actor.usage.remote() for actor in self._pool.members if actor is not None]
        for usage in recovery.answers(calls):
            self.report.cpu_seconds += usage["cpu_seconds"]
            self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, int(usage["peak_rss_bytes"]))

    def _end(self) -> None:
        self._pool.end()
        self._dispatcher.reset()
        self._transforms.reset()
        self._sums.clear()
        self.report.restarts = self._pool.restarts

    def _check(self) -> None:
        architecture = self._task.architecture
        names = [name for block in range(architecture.num_blocks) for name in architecture.block_tensors(block)]
        names += architecture.outer_tensors()
        calibrators = self._pool.members
        calls = [actor.check.remote(names[index :: len(calibrators)]) for index, actor in enumerate(calibrators)]
        wait_for_all([self._pool], calls)

    def _run_block(self, block: int, solved: dict[Unit, Solution]) -> Facts:
        """Compute a block; returns its row. solved: solutions of earlier attempts, to which new ones are added."""
        started = perf_counter()
        self._transforms.run(block)
        for stage, groups in enumerate(self._task.stages(block)):
            self._run_stage((block, stage), groups, solved)
        packed = {name: tensors for layers, _, _ in solved.values() for name, tensors in layers.items()}
        facts = [row for _, rows, _ in solved.values() for row in rows]
        order = [layer.name for group in self._task.layer_groups[block] for layer in group.layers]
        facts.sort(key=lambda row: order.index(row["layer"]))
        for row in facts:
            for note in row["notes"]:
                _LOG.warning("%s: %s", row["layer"], note)
        self._task.output.write_block(block, packed, facts)
        del packed
        solved.clear()
        self._stored.clear()
        release_memory()
        # Errors of weights, of experts that too few tokens reached, are no errors of outputs.
        errors = [row["error"] for row in facts if row["error_of"] == OUTPUT] or [row["error"] for row in facts]
        return {
            "block": block,
            "seconds": perf_counter() - started,
            "error": sum(errors) / len(errors) if errors else 0.0,
            "layers": len(facts),
        }

    def _run_stage(self, step: Step, groups: Sequence[Group], solved: dict[Unit, Solution]) -> None:
        """Collect and solve the groups of a stage that are not solved yet, and add the solutions to `solved`."""
        keys = {key for unit in solved for key in unit}
        unfinished = {group.key for group in self._task.output.unfinished(step[0])} - keys
        waiting = [group for group in groups if group.key in unfinished]
        self._sums.begin(step)
        attention = self._task.calibrates_attention(*step) and _ATTENTION_UNIT not in solved
        if self._settings.needs_inputs and (needs_inputs(waiting) or attention):
            self._collect(step, waiting, solved)
        self._solve(step, waiting, solved, attention)
        self._sums.finish(step)

    def _collect(self, step: Step, groups: list[Group], solved: Mapping[Unit, Solution]) -> None:
        """Request the sums of a stage's groups from all calibrators, each of which has its own chunks.

        So a straggler cannot be re-executed elsewhere. If the original's outputs are propagated, the next unfinished
        block does not depend on this block's solutions. Its sums are requested now, too, so that no calibrator is idle
        while another solves; not before transforms, which come first.
        """
        block, stage = step
        # In lists, so that calibrators do not hold all of them at once.
        earlier = [[self._packed((block, number), solved)] for number in range(stage)]
        self._pool.watch(self._sums.request(step, groups, earlier, self._pool.members))
        if self._settings.propagate == "original" and self._task.transforms is None:
            later = range(block + 1, len(self._task.layer_groups))
            unfinished = ((other, self._task.output.unfinished(other)) for other in later)
            for other, rest in islice(((other, rest) for other, rest in unfinished if needs_inputs(rest)), 1):
                self._pool.watch(self._sums.request((other, 0), rest, [], self._pool.members))

    def _packed(self, step: Step, solved: Mapping[Unit, Solution]) -> ObjectRef:
        """Packed layers of a solved stage, in the object store until the block is written."""
        if step not in self._stored:
            block, stage = step
            groups = self._task.stages(block)[stage]
            names = {layer.name for group in groups for layer in group.layers}
            attention = self._task.attention_name(block)
            if attention is not None and self._task.calibrates_attention(block, stage):
                names.add(attention)
            layers = (layer for packed, _, _ in solved.values() for layer in packed.items())
            self._stored[step] = put({name: parts for name, parts in layers if name in names})
        return self._stored[step]

    def _solve(self, step: Step, groups: list[Group], solved: dict[Unit, Solution], attention: bool) -> None:
        """Solve groups, most expensive first, and the attention where asked to; add the results to `solved`."""
        costs = {group.key: group.cost for group in groups}
        units = {unit: sum(costs[key] for key in unit) for unit in self._units(groups)}
        if attention:
            units[_ATTENTION_UNIT] = 0.0
        self._work.begin(step, units)
        for unit, solution in self._dispatcher.run(units, SharedQueue(units)):
            self._work.solved(unit)
            solved[unit] = solution

    def _units(self, groups: list[Group]) -> list[Unit]:
        """Keys of the groups of each call: small groups, such as experts, are solved together to save calls."""
        ordered = sorted(groups, key=lambda group: (-group.cost, group.key))
        if self._settings.block_solver is not None and groups[0].role is None:
            return [tuple(group.key for group in ordered)]
        min_cost = sum(group.cost for group in ordered) / (8 * len(self._chunks))
        units: list[list[str]] = []
        cost = min_cost
        for group in ordered:
            if cost >= min_cost:
                units.append([])
                cost = 0.0
            units[-1].append(group.key)
            cost += group.cost
        return [tuple(unit) for unit in units]

    def _retry(self, work: Callable[[], T]) -> T:
        """Result of work that needs all calibrators, because each has its own chunks; repeated after losses."""

        def attempt() -> T:
            self._pool.fill()
            try:
                return work()
            except RayError as error:
                raise self._pool.cause(error) from None

        return recovery.retry(attempt, lost=self._recover, out_of_memory=self._halve)

    def _recover(self, _: BaseException) -> None:
        """Replace lost calibrators, and collect the sums again that were lost with them."""
        for index, error in self._pool.lost().items():
            self._pool.replace(index, error)
        self._pool.fill()
        self._sums.recover()

    def _halve(self, _: BaseException) -> None:
        """Replace all calibrators by ones with half the batch, because all on a node run out of memory together."""
        self._batches.halve(0, self._pool.name)
        self._settings = replace(self._settings, batch=self._batches.of(0))
        self._sums.clear()
        for index in self._pool.alive:
            self._pool.replace(index)


def _check_division(settings: Settings) -> None:
    """UserError where a transform needs the gradients of whole blocks."""
    rotating = settings.rotating if settings.rotating is not None and settings.rotating.steps else None
    needing = settings.block_solver or rotating
    if needing is not None:
        raise UserError(f"transforms=[{type(needing).__name__.lower()}] needs whole blocks: use target_group.size=1")


def _warn_of_few(tokens: int, layer_groups: Sequence[Sequence[Group]]) -> None:
    """Log that the tokens are few for the widest layer; experts see a part of them, see expert_tokens."""
    columns = max((group.columns for groups in layer_groups for group in groups if not group.is_expert), default=0)
    if 0 < tokens < _FEW * columns:
        _LOG.warning(
            "%d calibration tokens are few for layers of %d columns: use %d or more (calibration.sequences)",
            tokens,
            columns,
            _FEW * columns,
        )
