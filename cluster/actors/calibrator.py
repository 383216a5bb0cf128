"""The calibrator actor: it holds a shard of the calibration sequences, collects statistics and quantizes layers."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray import ObjectRef
from torch import Tensor, nn

from hasten.accel.activations.ranges import HeadRanges, InputRange
from hasten.accel.compression.calibration.chunk_sums import Wanted
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.outer import is_outer, outer_method
from hasten.accel.compression.calibration.outer_solve import solve_outer, solve_outer_levels
from hasten.accel.compression.calibration.settings import Settings, Task
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.calibration.solve import (
    ObservedInputs,
    prepare_group,
    solve_block,
    solve_for_checkpoint,
    solve_levels,
)
from hasten.accel.compression.calibration.stages import ATTENTION
from hasten.accel.compression.calibration.statistics import Hessian, Tree
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.compression.transforms.base import target_change
from hasten.accel.compression.transforms.checkpoint import TransformedCheckpoint
from hasten.accel.compression.transforms.edits import Edits
from hasten.accel.compression.transforms.rotating import GradientPass
from hasten.accel.models.architecture import EMBEDDING
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

# Sums of a layer group: nodes of the summation tree as (start, size, tokens, sums, other sums).
Nodes = list[tuple[int, int, int, np.ndarray, dict[str, np.ndarray]]]
# Key of a block's attention among the keys of its layer groups.
ATTENTION_KEY = "attention"
# Keys of the hidden states that the solver of a whole block needs, in what collect() returns.
_STATES, _TARGETS = "states", "targets"


class Collected(NamedTuple):
    """What collect() returns: sums by key of the layer group, ranges by Group.range_key, and those of the attention."""

    sums: dict[str, Nodes]
    ranges: dict[str, np.ndarray]
    attention: dict[str, np.ndarray]


class _Packed(Mapping[str, Mapping[str, Tensor]]):
    """Packed layers of a stage, which stay in the object store and are fetched whenever one is read.

    Experts are read when they run, stage by stage: only the stage of the last one is in `held`, which stages share.
    """

    def __init__(self, reference: ObjectRef, held: dict[ObjectRef, Mapping[str, Mapping[str, Tensor]]]) -> None:
        self._reference, self._held = reference, held

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return self._layers()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers())

    def __len__(self) -> int:
        return len(self._layers())

    def _layers(self) -> Mapping[str, Mapping[str, Tensor]]:
        if self._reference not in self._held:
            self._held.clear()
            self._held[self._reference] = ray.get(self._reference)
        return self._held[self._reference]


class Calibrator:
    """Holds the hidden states of some chunks and advances them block by block.

    After a loss, the replacement recomputes the hidden states from the finished blocks. chunks: calibration tokens
    [sequences, T] by chunk number; empty if no statistics are needed.
    """

    def __init__(self, settings: Settings, chunks: Mapping[int, Tensor]) -> None:
        torch.set_num_threads(settings.threads)
        torch.set_grad_enabled(False)
        self._settings = settings
        self._task = Task(settings)
        self._cpu_before = cpu_seconds()
        self._groups = {group.key: group for groups in self._task.layer_groups for group in groups}
        self._chunks = chunks
        self._shard: Shard | None = None
        self._rotation_pass: GradientPass | None = None
        # The packed layers that were fetched last.
        self._held: dict[ObjectRef, Mapping[str, Mapping[str, Tensor]]] = {}

    def check(self, names: list[str]) -> None:
        """Raise UserError naming a tensor that has NaN or Inf."""
        for name in names:
            self._task.original.check(name)
        release_memory()

    def collect(self, block: int, keys: Collection[str], stage: int = 0, *solved: Mapping[str, Any]) -> Collected:
        """Statistics of layer inputs in a block over this shard, for the layer groups `keys` of a stage.

        Sums of experts that no token reached are an empty list. The caller chooses the groups: if each shard looked on
        the disk for unfinished ones, shards that look at different times would collect different groups.
        solved: packed tensors by layer, or by attention, of the block's earlier stages, one mapping for each, or a list
        with a reference to it; of a level database empty. A negative stage is before the first, for transforms: the
        uncompressed block, with the edits in `solved`.

        Missing hidden states are computed from the earlier blocks. These must be finished if their compressed outputs
        are propagated.
        """
        self._rotation_pass = None
        release_memory()
        try:
            if stage >= 0 and self._solves(block):
                return Collected(self._states(block), {}, {})
            trees, ranges, attention = self._collect(block, keys, stage, solved)
        except BaseException:
            # A block may have stopped in the middle.
            self._shard = None
            raise
        sums: dict[str, Nodes] = {key: [] for key in keys}
        sums |= {
            key: [(start, size, node.tokens, node.array(), node.others()) for (start, size), node in tree.nodes.items()]
            for key, tree in trees.items()
        }
        arrays = {key: inputs.array() for key, inputs in ranges.items()}
        return Collected(sums, arrays, {} if attention is None else attention.array())

    def solve(
        self, block: int, keys: list[str], *collected: Collected
    ) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]], float]:
        """Quantize layer groups of a block, or calibrate its attention, ATTENTION_KEY.

        collected: results of `collect` of all calibrators.

        Returns packed tensors by layer, one row of facts for each layer, and the wall seconds. For a level database,
        layers are written here: there are no packed tensors, and one row for each level.
        """
        started = perf_counter()
        release_memory()
        settings, task = self._settings, self._task
        if keys and self._solves(block):
            of_layers = self._solve_block(block, collected)
            return *of_layers, perf_counter() - started
        packed: dict[str, dict[str, Tensor]] = {}
        facts: list[dict[str, Any]] = []
        for key in keys:
            if key == ATTENTION_KEY:
                packed |= self._calibrate_attention(block, collected)
                continue
            group = self._groups[key]
            hessian = self._total(group, collected)
            if group.role is not None:
                method = outer_method(group, settings.quantizer)
                prepared = prepare_group(group, method, hessian, 0, settings.device)
                if isinstance(task.output, LevelDatabase):
                    facts += solve_outer_levels(task.output, group, prepared, settings.device)
                else:
                    packed[key], row = solve_outer(group, group.level, task.checkpoint, prepared, settings.device)
                    facts.append(row)
                continue
            ready = [
                prepare_group(group, method, hessian, settings.expert_tokens, settings.device)
                for method in settings.methods
            ]
            observed = ObservedInputs(_merged(collected, group.range_key), settings.observer)
            change = target_change(settings.transforms, hessian, settings.device)
            if isinstance(task.output, LevelDatabase):
                facts += solve_levels(task.output, group, task.checkpoint, ready, observed, settings.device, change)
            else:
                packed_form = settings.gguf is not None
                tensors, rows = solve_for_checkpoint(
                    group, task.checkpoint, ready, observed, settings.device, packed_form, change
                )
                packed |= tensors
                facts += rows
        return packed, facts, perf_counter() - started

    def _calibrate_attention(self, block: int, collected: Sequence[Collected]) -> dict[str, dict[str, Tensor]]:
        """Scales of a block's attention by its name; those of a level database are written here."""
        task = self._task
        name, scheme = task.attention_name(block), self._settings.attention
        assert name is not None
        assert scheme is not None
        ranges = HeadRanges()
        for shard in collected:
            ranges.merge(HeadRanges.from_array(shard.attention))
        dtype = task.checkpoint.dtype(task.architecture.block_tensors(block)[0])
        scales = scheme.tensors(ranges, dtype, name)
        if isinstance(task.output, LevelDatabase):
            task.output.write_attention(name, scales)
            return {}
        return {name: scales}

    def transform(
        self, block: int, number: int, keys: Sequence[str], edits: tuple[Edits, Edits], *collected: Collected
    ) -> list[Edits]:
        """Edits of some parts `keys` of a block by a transform, whose number counts those that make edits.

        edits: those of earlier transforms, before and since the statistics were collected. collected: results of
        `collect` of all calibrators; none for transforms without statistics.
        """
        release_memory()
        sequence, architecture = self._task.transforms, self._task.architecture
        assert sequence is not None
        transform = sequence.transforms[number]
        view = sequence.view(architecture, block, *edits, {})
        needed = {key for part in transform.parts(view) if part.key in keys for key in part.groups}
        totals = {key: self._total(self._groups[key], collected) for key in sorted(needed)} if collected else {}
        statistics = {key: total for key, total in totals.items() if total is not None}
        view = sequence.view(architecture, block, *edits, statistics)
        return [transform.edits(view, key) for key in keys]

    def _solves(self, block: int) -> bool:
        """Whether a transform compresses the layers of a block together."""
        return self._settings.block_solver is not None and not is_outer(self._task.layer_groups[block])

    def _states(self, block: int) -> dict[str, Nodes]:
        """Inputs and targets of a block for its solver, by chunk: a node of a chunk holds both."""
        states = self._catch_up(block).block_states(self._load(block))
        arrays = {number: [part.float().cpu().numpy() for part in pair] for number, pair in states.items()}
        return {_STATES: [(number, 1, 0, inputs, {_TARGETS: targets}) for number, (inputs, targets) in arrays.items()]}

    def _solve_block(
        self, block: int, collected: Sequence[Collected]
    ) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
        """All layers of a block, by the transform that compresses them together."""
        settings, task = self._settings, self._task
        assert settings.block_solver is not None
        nodes = sorted((node for part in collected for node in part.sums[_STATES]), key=lambda node: node[0])
        # Arrays in the object store are read-only: cat copies them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = torch.cat([torch.from_numpy(array) for _, _, _, array, _ in nodes])
            targets = torch.cat([torch.from_numpy(others[_TARGETS]) for _, _, _, _, others in nodes])
        groups = task.layer_groups[block]
        return solve_block(settings.block_solver, task.architecture, block, groups, settings.quantizer, inputs, targets)

    def rotate(
        self, rotation: tuple[np.ndarray | None, list[np.ndarray]], *parts: Tensor
    ) -> list[tuple[int, float, np.ndarray, list[np.ndarray]]]:
        """Fields of the gradients by a rotation, of tokens (B, T) each. rotation: fields of Rotation."""
        task, settings = self._task, self._settings
        assert task.unrotated is not None
        if self._rotation_pass is None:
            assert settings.rotating is not None
            self._rotation_pass = settings.rotating.gradient_pass(
                task.unrotated.checkpoint, task.layer_groups, settings.methods, task.architecture
            )
        residual, heads = rotation
        assert residual is not None
        given = torch.from_numpy(residual.copy()), [torch.from_numpy(matrix.copy()) for matrix in heads]
        results = [self._rotation_pass.gradient(*given, part) for part in parts]
        release_memory()
        return [
            (one.tokens, one.divergence, one.residual.cpu().numpy(), [matrix.cpu().numpy() for matrix in one.heads])
            for one in results
        ]

    def usage(self) -> dict[str, float]:
        """CPU seconds since the actor was created, and peak resident memory in bytes."""
        return {"cpu_seconds": cpu_seconds() - self._cpu_before, "peak_rss_bytes": peak_rss_bytes()}

    def _total(self, group: Group, collected: Sequence[Collected]) -> Hessian | None:
        """Sum over all calibrators of the statistics of a group's input; None where no token reached it."""
        tree = Tree(self._settings.cut)
        for shard in collected:
            if group.key not in shard.sums:
                raise RuntimeError(f"a shard's sums of {group.key} in block {group.block} are missing")
            for start, size, tokens, sums, others in shard.sums[group.key]:
                tree.add(start, size, Hessian.from_array(group.columns, sums, tokens, others))
        return tree.total() if tree.nodes else None

    def _collect(
        self, block: int, keys: Collection[str], stage: int, solved: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Tree], dict[str, InputRange], HeadRanges | None]:
        groups = self._task.layer_groups[block]
        if stage < 0:
            shard = self._catch_up(block, stage)
            assert isinstance(self._task.checkpoint, TransformedCheckpoint)
            with self._task.checkpoint.with_edits(block, solved[0]):
                # Within, because experts are read when they run.
                wanted = [group for group in groups if group.key in keys]
                trees = shard.collect(self._load(block), wanted, wanted=Wanted(magnitudes=True))
            return trees, {}, None
        if is_outer(groups):
            head = next((group for group in groups if group.role != EMBEDDING), None)
            if head is None:
                return {}, {}, None
            shard = self._catch_up(block)
            trees = shard.collect_outputs(self._task.architecture.streamed_output_layer(), head.key)
            return trees, {}, None
        if self._settings.propagate != "sequential":
            wanted = [group for group in groups if group.key in keys]
            shard = self._catch_up(block)
            trees = shard.collect(self._load(block), wanted, advance=self._settings.propagate == "original")
            return trees, shard.ranges, shard.attention
        shard = self._catch_up(block, stage)
        staged = shard.staged or shard.begin(self._load(block), groups, partial(self._load, block))
        output = self._task.output
        for number in range(staged.replaced, stage):
            packed = self._packed(solved[number])
            if staged.stages[number] == ATTENTION:
                name = self._attention(block)
                staged.round_attention(output.unpack_attention(name, packed.get(name, {})))
            else:
                layers = staged.stages[number]
                weights = output.unpack_layers(layers, packed)
                staged.replace(weights, output.unpack_inputs(layers, packed))
        return shard.collect_stage(stage, keys), staged.ranges, staged.attention

    def _catch_up(self, block: int, stage: int = 0) -> Shard:
        """The shard at the input of a block, or in it where its inputs of a stage can still be collected."""
        shard = self._shard
        if shard is None or shard.position > block or not _can_collect(shard, block, stage):
            settings = self._settings
            shard = self._shard = Shard(
                self._task.architecture,
                self._chunks,
                settings.batch,
                settings.cut,
                settings.wanted,
                settings.needs_original,
            )
        while shard.position < block:
            self._advance(shard)
            release_memory()
        return shard

    def _advance(self, shard: Shard) -> None:
        """Bring a shard to the input of the next block; its block is finished, unless the original is propagated."""
        groups, output = self._task.layer_groups[shard.position], self._task.output
        if shard.staged is not None:
            for stage in shard.staged.stages[shard.staged.replaced :]:
                if stage == ATTENTION:
                    shard.staged.round_attention(output.read_attention(self._attention(shard.position)))
                else:
                    shard.staged.replace(output.read_layers(stage), output.read_inputs(stage))
            shard.finish()
            self._held.clear()
            return
        architecture, module = self._task.architecture, self._load(shard.position)
        if self._settings.propagate != "original":
            architecture.replace_weights(module, output.read_layers(groups))
            architecture.round_inputs(module, output.read_inputs(groups))
            name = self._task.attention_name(shard.position)
            if name is not None:
                architecture.round_attention(module, output.read_attention(name))
        shard.advance(module, partial(self._load, shard.position))

    def _attention(self, block: int) -> str:
        """Name of a block's attention, which has one whose keys and values are rounded."""
        name = self._task.attention_name(block)
        assert name is not None
        return name

    def _packed(self, solved: Any) -> Mapping[str, Mapping[str, Tensor]]:
        """Packed layers of a stage; solved: these, or a list with a reference to them."""
        return _Packed(solved[0], self._held) if isinstance(solved, list) else solved

    def _load(self, block: int) -> nn.Module:
        return self._task.architecture.stream_block(block)


def _merged(collected: Sequence[Collected], key: str) -> InputRange:
    """Range of the inputs that have this key, over all calibrators."""
    merged = InputRange()
    for shard in collected:
        if key in shard.ranges:
            merged.merge(InputRange.from_array(shard.ranges[key]))
    return merged


def _can_collect(shard: Shard, block: int, stage: int) -> bool:
    """Whether the shard has not passed a stage of a block at or behind which it is."""
    if stage < 0 and shard.position == block:
        return shard.staged is None
    return shard.staged is None or shard.position < block or shard.staged.can_collect(stage)
