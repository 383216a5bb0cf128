"""The calibrator actor: it holds a shard of the calibration sequences, collects statistics and quantizes layers."""

from collections.abc import Collection, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from torch import Tensor, nn

from hasten.accel.compression.activations.ranges import HeadRanges, InputRange
from hasten.accel.compression.calibration.outer import is_outer, outer_method
from hasten.accel.compression.calibration.outer_solve import solve_outer, solve_outer_levels
from hasten.accel.compression.calibration.settings import Settings, Task
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.calibration.solve import (
    ObservedInputs,
    prepare_group,
    solve_for_checkpoint,
    solve_levels,
)
from hasten.accel.compression.calibration.stages import ATTENTION
from hasten.accel.compression.calibration.statistics import Hessian, Tree
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.models.architecture import EMBEDDING
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

# Sums of a layer group: nodes of the summation tree as (start, size, tokens, sums).
Nodes = list[tuple[int, int, int, np.ndarray]]
# Key of a block's attention among the keys of its layer groups.
ATTENTION_KEY = "attention"


class Collected(NamedTuple):
    """What collect() returns: sums by key of the layer group, ranges by Group.range_key, and those of the attention."""

    sums: dict[str, Nodes]
    ranges: dict[str, np.ndarray]
    attention: dict[str, np.ndarray]


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

    def check(self, names: list[str]) -> None:
        """Raise UserError naming a tensor that has NaN or Inf."""
        for name in names:
            self._task.checkpoint.check(name)
        release_memory()

    def collect(
        self, block: int, keys: Collection[str], stage: int = 0, *solved: Mapping[str, Mapping[str, Tensor]]
    ) -> Collected:
        """Statistics of layer inputs in a block over this shard, for the layer groups `keys` of a stage.

        Sums of experts that no token reached are an empty list. The caller chooses the groups: if each shard looked on
        the disk for unfinished ones, shards that look at different times would collect different groups.
        solved: packed tensors by layer, or by attention, of the block's earlier stages, one mapping for each, or a list
        with a reference to it; of a level database empty.

        Missing hidden states are computed from the earlier blocks. These must be finished if their compressed outputs
        are propagated.
        """
        release_memory()
        try:
            trees, ranges, attention = self._collect(block, keys, stage, solved)
        except BaseException:
            # A block may have stopped in the middle.
            self._shard = None
            raise
        sums: dict[str, Nodes] = {key: [] for key in keys}
        sums |= {
            key: [(start, size, node.tokens, node.array()) for (start, size), node in tree.nodes.items()]
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
        packed: dict[str, dict[str, Tensor]] = {}
        facts: list[dict[str, Any]] = []
        for key in keys:
            if key == ATTENTION_KEY:
                packed |= self._calibrate_attention(block, collected)
                continue
            group = self._groups[key]
            tree = Tree(settings.cut)
            for shard in collected:
                if key not in shard.sums:
                    raise RuntimeError(f"a shard's sums of {key} in block {block} are missing")
                for start, size, tokens, sums in shard.sums[key]:
                    tree.add(start, size, Hessian.from_array(group.columns, sums, tokens))
            hessian = tree.total() if tree.nodes else None
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
            if isinstance(task.output, LevelDatabase):
                facts += solve_levels(task.output, group, task.checkpoint, ready, observed, settings.device)
            else:
                packed_form = settings.gguf is not None
                tensors, rows = solve_for_checkpoint(
                    group, task.checkpoint, ready, observed, settings.device, packed_form
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

    def usage(self) -> dict[str, float]:
        """CPU seconds since the actor was created, and peak resident memory in bytes."""
        return {"cpu_seconds": cpu_seconds() - self._cpu_before, "peak_rss_bytes": peak_rss_bytes()}

    def _collect(
        self, block: int, keys: Collection[str], stage: int, solved: Sequence[Mapping[str, Mapping[str, Tensor]]]
    ) -> tuple[dict[str, Tree], dict[str, InputRange], HeadRanges | None]:
        groups = self._task.layer_groups[block]
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
        staged = shard.staged or shard.begin(self._load(block), groups)
        output = self._task.output
        for number in range(staged.replaced, stage):
            packed = _fetched(solved[number])
            if staged.stages[number] == ATTENTION:
                name = self._attention(block)
                staged.round_attention(output.unpack_attention(name, packed.get(name, {})))
            else:
                layers = staged.stages[number]
                weights = output.unpack_layers(layers, packed)
                staged.replace(weights, output.unpack_inputs(layers, packed))
        return staged.collect(stage, keys), staged.ranges, staged.attention

    def _catch_up(self, block: int, stage: int = 0) -> Shard:
        """The shard at the input of a block, or in it where its inputs of a stage can still be collected."""
        shard = self._shard
        if shard is None or shard.position > block or not _can_collect(shard, block, stage):
            settings = self._settings
            shard = self._shard = Shard(
                self._task.architecture, self._chunks, settings.batch, settings.cut, settings.wanted
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
            return
        architecture, module = self._task.architecture, self._load(shard.position)
        if self._settings.propagate != "original":
            architecture.replace_weights(module, output.read_layers(groups))
            architecture.round_inputs(module, output.read_inputs(groups))
            name = self._task.attention_name(shard.position)
            if name is not None:
                architecture.round_attention(module, output.read_attention(name))
        shard.advance(module)

    def _attention(self, block: int) -> str:
        """Name of a block's attention, which has one whose keys and values are rounded."""
        name = self._task.attention_name(block)
        assert name is not None
        return name

    def _load(self, block: int) -> nn.Module:
        return self._task.architecture.load_block(block)


def _fetched(solved: Any) -> Mapping[str, Mapping[str, Tensor]]:
    """Packed layers of a stage; a reference in a list is resolved only now, so that one stage is held at a time."""
    layers: Mapping[str, Mapping[str, Tensor]] = ray.get(solved[0]) if isinstance(solved, list) else solved
    return layers


def _merged(collected: Sequence[Collected], key: str) -> InputRange:
    """Range of the inputs that have this key, over all calibrators."""
    merged = InputRange()
    for shard in collected:
        if key in shard.ranges:
            merged.merge(InputRange.from_array(shard.ranges[key]))
    return merged


def _can_collect(shard: Shard, block: int, stage: int) -> bool:
    """Whether the shard has not passed a stage of a block at or behind which it is."""
    return shard.staged is None or shard.position < block or shard.staged.can_collect(stage)
