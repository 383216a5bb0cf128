"""The calibration pass on one shard of the calibration sequences: hidden states, and statistics of layer inputs.

A shard holds whole chunks. A chunk runs in the same batches on every worker, so that its hidden states and sums have
the same bits for any number of shards.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.stages import StagedBlock
from hasten.accel.compression.calibration.statistics import Hessian, Tree
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.output_layer import OutputLayer


class _AllCollected(Exception):  # noqa: N818 (not an error: the rest of the block need not run)
    """All statistics of a block are collected."""


class Shard:
    """Hidden states [sequences, T, D] of some chunks, at the input of block `position`.

    cut: see statistics.Tree. staged: that block, where it is in the middle of its forward; it holds the hidden states
    then.
    """

    def __init__(self, architecture: Architecture, chunks: Mapping[int, Tensor], batch: int, cut: int = 0) -> None:
        self.architecture = architecture
        self._cut = cut
        self.position = 0
        self.staged: StagedBlock | None = None
        self._hidden = {
            number: [architecture.embed(part) for part in tokens.split(batch)] for number, tokens in chunks.items()
        }

    def collect(self, block: nn.Module, groups: Sequence[Group], advance: bool = False) -> dict[str, Tree]:
        """Run the block at `position`; returns the Hessians of the groups' inputs by group key.

        advance: keep the outputs as hidden states of the next block. Experts that no token reached have no entry.
        """
        trees: dict[str, Tree] = {}
        # The rest of the block is skipped after the input of the last group. Which expert runs last depends on tokens.
        last = None if advance or any(group.is_expert for group in groups) else groups[-1].key
        for number, parts in self._hidden.items():
            hessians: dict[str, Hessian] = {}
            hooks = [self._watch(block, group, hessians, stop=group.key == last) for group in groups]
            try:
                for index, part in enumerate(parts):
                    with suppress(_AllCollected):
                        output = self.architecture.run_block(block, self.position, part)
                        if advance:
                            parts[index] = output
            finally:
                for hook in hooks:
                    hook.remove()
            for key, hessian in hessians.items():
                trees.setdefault(key, Tree(self._cut)).add(number, 1, hessian)
        if advance:
            self.position += 1
        return trees

    def advance(self, block: nn.Module) -> None:
        """Replace the hidden states by the outputs of the block at `position`."""
        for parts in self._hidden.values():
            for index, part in enumerate(parts):
                parts[index] = self.architecture.run_block(block, self.position, part)
        self.position += 1

    def collect_outputs(self, layer: OutputLayer, key: str) -> dict[str, Tree]:
        """The Hessian of the output layer's inputs, by `key`; the shard must be behind the last block."""
        assert self.position == self.architecture.num_blocks
        tree = Tree(self._cut)
        for number, parts in self._hidden.items():
            hessian = Hessian(layer.width)
            for part in parts:
                hessian.add(layer.inputs(part).reshape(-1, layer.width))
            tree.add(number, 1, hessian)
        return {key: tree}

    def begin(self, block: nn.Module, groups: Sequence[Group]) -> StagedBlock:
        """Begin the forward of the block at `position`; groups: all layer groups of the block, at least one."""
        hidden, self._hidden = self._hidden, {}
        run = partial(self.architecture.run_block, block, self.position)
        self.staged = StagedBlock(block, groups, hidden, run, self._cut)
        return self.staged

    def finish(self) -> None:
        """End the forward that was begun: its outputs are the hidden states of the next block."""
        assert self.staged is not None
        self._hidden, self.staged = self.staged.finish(), None
        self.position += 1

    @staticmethod
    def _watch(
        block: nn.Module, group: Group, hessians: dict[str, Hessian], stop: bool
    ) -> torch.utils.hooks.RemovableHandle:
        # Layers of a group share their input, so a hook on the first one suffices.
        layer = group.layers[0]

        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, layer.columns)
            if len(rows):
                hessians.setdefault(group.key, Hessian(layer.columns)).add(rows)
            if stop:
                raise _AllCollected

        return block.get_submodule(layer.module).register_forward_pre_hook(add)
