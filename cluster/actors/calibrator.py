"""The calibrator actor: it holds a shard of the calibration sequences, collects statistics and quantizes layers."""

from collections.abc import Collection, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.accel.compression.calibration.settings import Settings, Task
from hasten.accel.compression.calibration.shard import Shard, replace_weights
from hasten.accel.compression.calibration.solve import prepare_group, solve_for_checkpoint, solve_levels
from hasten.accel.compression.calibration.statistics import Hessian, Tree
from hasten.accel.compression.levels.database import LevelDatabase
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

    def collect(self, block: int, keys: Collection[str]) -> dict[str, Nodes]:
        """Sums of layer inputs in a block over this shard, for the layer groups `keys`.

        Experts that no token reached have an empty list. The caller chooses the groups: if each shard looked on the
        disk for unfinished ones, shards that look at different times would collect different groups.

        Missing hidden states are computed from the earlier blocks. These must be finished if their quantized outputs
        are propagated.
        """
        release_memory()
        shard = self._catch_up(block)
        module = self._task.architecture.load_block(block)
        original = self._settings.propagate == "original"
        groups = [group for group in self._task.layer_groups[block] if group.key in keys]
        trees = shard.collect(module, groups, advance=original)
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
            tree = Tree()
            for nodes in collected:
                if key not in nodes:
                    raise RuntimeError(f"a shard's sums of {key} in block {block} are missing")
                for start, size, tokens, sums in nodes[key]:
                    tree.add(start, size, Hessian.from_array(group.columns, sums, tokens))
            hessian = tree.total() if tree.nodes else None
            ready = [
                prepare_group(group, method, hessian, settings.expert_tokens, settings.device)
                for method in settings.methods
            ]
            if isinstance(task.output, LevelDatabase):
                facts += solve_levels(task.output, group, task.checkpoint, ready, settings.device)
            else:
                tensors, rows = solve_for_checkpoint(group, task.checkpoint, ready, settings.device)
                packed |= tensors
                facts += rows
        return packed, facts, perf_counter() - started

    def usage(self) -> tuple[float, int]:
        """CPU seconds since the actor was created, and peak resident memory in bytes."""
        return cpu_seconds() - self._cpu_before, peak_rss_bytes()

    def _catch_up(self, block: int) -> Shard:
        if self._shard is None or self._shard.position > block:
            self._shard = Shard(self._task.architecture, self._chunks, self._settings.batch)
        while self._shard.position < block:
            position = self._shard.position
            module = self._task.architecture.load_block(position)
            if self._settings.propagate == "quantized":
                replace_weights(module, self._task.output.read_block(position))
            self._shard.advance(module)
            del module
            release_memory()
        return self._shard
