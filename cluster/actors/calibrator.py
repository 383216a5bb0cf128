"""The calibrator actor: it holds a shard of the calibration sequences, collects statistics and quantizes layers."""

from collections.abc import Collection, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from hasten.accel.compression.calibration.outer import is_outer, outer_method
from hasten.accel.compression.calibration.outer_solve import solve_outer, solve_outer_levels
from hasten.accel.compression.calibration.settings import Settings, Task
from hasten.accel.compression.calibration.shard import Shard
from hasten.accel.compression.calibration.solve import prepare_group, solve_for_checkpoint, solve_levels
from hasten.accel.compression.calibration.statistics import Hessian, Tree
from hasten.accel.compression.levels.database import LevelDatabase
from hasten.accel.models.architecture import EMBEDDING
from hasten.cluster.runtime.resources import cpu_seconds, peak_rss_bytes, release_memory

# What collect() returns for a layer group: nodes of the summation tree as (start, size, tokens, sums).
Nodes = list[tuple[int, int, int, np.ndarray]]


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
    ) -> dict[str, Nodes]:
        """Sums of layer inputs in a block over this shard, for the layer groups `keys` of a stage.

        Experts that no token reached have an empty list. The caller chooses the groups: if each shard looked on the
        disk for unfinished ones, shards that look at different times would collect different groups.
        solved: packed tensors by layer of the block's earlier stages, one mapping for each, or a list with a reference
        to it; of a level database empty.

        Missing hidden states are computed from the earlier blocks. These must be finished if their compressed outputs
        are propagated.
        """
        release_memory()
        try:
            trees = self._collect(block, keys, stage, solved)
        except BaseException:
            # A block may have stopped in the middle.
            self._shard = None
            raise
        return {key: [] for key in keys} | {
            key: [(start, size, node.tokens, node.array()) for (start, size), node in tree.nodes.items()]
            for key, tree in trees.items()
        }

    def solve(
        self, block: int, keys: list[str], *collected: Mapping[str, Nodes]
    ) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]], float]:
        """Quantize layer groups of a block. collected: results of `collect` of all calibrators.

        Returns packed tensors by layer, one row of facts for each layer, and the wall seconds. For a level database,
        layers are written here: there are no packed tensors, and one row for each level.
        """
        started = perf_counter()
        release_memory()
        settings, task = self._settings, self._task
        packed: dict[str, dict[str, Tensor]] = {}
        facts: list[dict[str, Any]] = []
        for key in keys:
            group = self._groups[key]
            tree = Tree(settings.cut)
            for nodes in collected:
                if key not in nodes:
                    raise RuntimeError(f"a shard's sums of {key} in block {block} are missing")
                for start, size, tokens, sums in nodes[key]:
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
            if isinstance(task.output, LevelDatabase):
                facts += solve_levels(task.output, group, task.checkpoint, ready, settings.device)
            else:
                packed_form = settings.gguf is not None
                tensors, rows = solve_for_checkpoint(group, task.checkpoint, ready, settings.device, packed_form)
                packed |= tensors
                facts += rows
        return packed, facts, perf_counter() - started

    def usage(self) -> dict[str, float]:
        """CPU seconds since the actor was created, and peak resident memory in bytes."""
        return {"cpu_seconds": cpu_seconds() - self._cpu_before, "peak_rss_bytes": peak_rss_bytes()}

    def _collect(
        self, block: int, keys: Collection[str], stage: int, solved: Sequence[Mapping[str, Mapping[str, Tensor]]]
    ) -> dict[str, Tree]:
        groups = self._task.layer_groups[block]
        if is_outer(groups):
            head = next((group for group in groups if group.role != EMBEDDING), None)
            if head is None:
                return {}
            shard = self._catch_up(block)
            return shard.collect_outputs(self._task.architecture.streamed_output_layer(), head.key)
        if self._settings.propagate != "sequential":
            wanted = [group for group in groups if group.key in keys]
            shard = self._catch_up(block)
            return shard.collect(self._load(block), wanted, advance=self._settings.propagate == "original")
        shard = self._catch_up(block, stage)
        staged = shard.staged or shard.begin(self._load(block), groups)
        for number in range(staged.replaced, stage):
            staged.replace(self._task.output.unpack_layers(staged.stages[number], _fetched(solved[number])))
        return staged.collect(stage, keys)

    def _catch_up(self, block: int, stage: int = 0) -> Shard:
        """The shard at the input of a block, or in it where its inputs of a stage can still be collected."""
        shard = self._shard
        if shard is None or shard.position > block or not _can_collect(shard, block, stage):
            shard = self._shard = Shard(self._task.architecture, self._chunks, self._settings.batch, self._settings.cut)
        while shard.position < block:
            self._advance(shard)
            release_memory()
        return shard

    def _advance(self, shard: Shard) -> None:
        """Bring a shard to the input of the next block; its block is finished, unless the original is propagated."""
        groups = self._task.layer_groups[shard.position]
        if shard.staged is not None:
            for stage in shard.staged.stages[shard.staged.replaced :]:
                shard.staged.replace(self._task.output.read_layers(stage))
            shard.finish()
            return
        module = self._load(shard.position)
        if self._settings.propagate != "original":
            self._task.architecture.replace_weights(module, self._task.output.read_layers(groups))
        shard.advance(module)

    def _load(self, block: int) -> nn.Module:
        return self._task.architecture.load_block(block)


def _fetched(solved: Any) -> Mapping[str, Mapping[str, Tensor]]:
    """Packed layers of a stage; a reference in a list is resolved only now, so that one stage is held at a time."""
    found: Any = ray.get(solved[0]) if isinstance(solved, list) else solved
    layers: Mapping[str, Mapping[str, Tensor]] = found
    return layers


def _can_collect(shard: Shard, block: int, stage: int) -> bool:
    """Whether the shard has not passed a stage of a block at or behind which it is."""
    return shard.staged is None or shard.position < block or shard.staged.can_collect(stage)
