"""The calibration pass on one shard of the calibration sequences: hidden states, and statistics of layer inputs.

A shard holds whole chunks. A chunk runs in the same batches on every worker, so that its hidden states and sums have
the same bits for any number of shards.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.activations.hooks import attention_path, attention_states
from hasten.accel.activations.ranges import HeadRanges, InputRange
from hasten.accel.compression.calibration.chunk_sums import ChunkSums, Wanted
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.stages import Stage, StagedBlock, container, members_of
from hasten.accel.compression.calibration.statistics import Hessian, Tree
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.forwards import Forward, current_forward
from hasten.accel.models.output_layer import OutputLayer


class _AllCollected(Exception):  # noqa: N818 (not an error: the rest of the block need not run)
    """All statistics of a block are collected."""


class _ChunkForward(Forward):
    """The forward of a part of a chunk."""

    def __init__(self, function: Callable[[], None], chunk: int) -> None:
        super().__init__(function)
        self.chunk = chunk


class Shard:
    """Hidden states [sequences, T, D] of some chunks, at the input of block `position`.

    cut: see statistics.Tree. wanted: what `collect` collects. staged: that block, where it is in the middle of its
    forward; it holds the hidden states then. ranges, attention: of the last `collect`, see ChunkSums; None where the
    block has no attention with a cache, or its ranges are not wanted. original: whether hidden states of the original
    model are held, too, for the shift of the layers' inputs.
    """

    def __init__(
        self,
        architecture: Architecture,
        chunks: Mapping[int, Tensor],
        batch: int,
        cut: int = 0,
        wanted: Wanted | None = None,
        original: bool = False,
    ) -> None:
        self.architecture = architecture
        self._cut, self._wanted = cut, wanted or Wanted()
        self.ranges: dict[str, InputRange] = {}
        self.attention: HeadRanges | None = None
        self.position = 0
        self.staged: StagedBlock | None = None
        self._hidden = {
            number: [architecture.embed(part) for part in tokens.split(batch)] for number, tokens in chunks.items()
        }
        self._original = {number: list(parts) for number, parts in self._hidden.items()} if original else None
        self._original_staged: StagedBlock | None = None

    def collect(
        self, block: nn.Module, groups: Sequence[Group], advance: bool = False, wanted: Wanted | None = None
    ) -> dict[str, Tree]:
        """Run the block at `position`; returns the Hessians of the groups' inputs by group key.

        advance: keep the outputs as hidden states of the next block. wanted: what is collected, None for what the shard
        collects. Experts that no token reached have no entry.
        """
        wanted = wanted or self._wanted
        sums = ChunkSums(self._cut, wanted)
        self.attention = None
        # The rest of the block is skipped after the input of the last group. Which expert runs last depends on tokens.
        runs_on = advance or wanted.attention or any(group.is_expert for group in groups)
        last = None if runs_on else groups[-1].key
        hooks = [self._watch(block, group, sums, stop=group.key == last) for group in groups]
        undo = [_show_all(block.get_submodule(path), members) for path, members in self._mixtures(groups).items()]
        if wanted.attention and attention_path(block) is not None:
            self.attention = HeadRanges()
            attention_states(block).observe = self.attention.add
        try:
            self._run(block, self._hidden, keep=advance)
        finally:
            for hook in hooks:
                hook.remove()
            for restore in undo:
                restore()
            if self.attention is not None:
                attention_states(block).observe = None
        if advance:
            self.position += 1
        self.ranges = sums.ranges
        return sums.trees()

    def advance(self, block: nn.Module, original: Callable[[], nn.Module] | None = None) -> None:
        """Replace the hidden states by the outputs of the block at `position`. original: loads it uncompressed."""
        self._run(block, self._hidden, keep=True)
        if self._original is not None:
            assert original is not None
            self._run(original(), self._original, keep=True)
        self.position += 1

    def block_states(self, original: nn.Module) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each chunk, the inputs of the block at `position`, and what the original block makes of its own inputs.

        Both are [sequences, T, D]. original: the block, uncompressed.
        """
        assert self._original is not None
        outputs = {number: list(parts) for number, parts in self._original.items()}
        self._run(original, outputs, keep=True)
        return {number: (torch.cat(parts), torch.cat(outputs[number])) for number, parts in self._hidden.items()}

    def collect_outputs(self, layer: OutputLayer, key: str) -> dict[str, Tree]:
        """The Hessian of the output layer's inputs, by `key`; the shard must be behind the last block."""
        assert self.position == self.architecture.num_blocks
        tree = Tree(self._cut)
        self.ranges, self.attention = {}, None
        if not self._wanted.hessian:
            return {}
        for number, parts in self._hidden.items():
            hessian = Hessian(layer.width)
            for part in parts:
                hessian.add(layer.inputs(part).reshape(-1, layer.width))
            tree.add(number, 1, hessian)
        return {key: tree}

    def _run(self, block: nn.Module, hidden: Mapping[int, list[Tensor]], keep: bool) -> None:
        """Run all parts of hidden states. keep: replace them by the outputs."""

        def run(parts: list[Tensor], index: int) -> None:
            with suppress(_AllCollected):
                output = self.architecture.run_block(block, self.position, parts[index])
                if keep:
                    parts[index] = output

        places = [(number, parts, index) for number, parts in hidden.items() for index in range(len(parts))]
        for lot in self.architecture.lots(self.position, [parts[index] for _, parts, index in places]):
            chosen = [places[place] for place in lot]
            self.architecture.run_forwards(
                block, [_ChunkForward(partial(run, parts, index), number) for number, parts, index in chosen]
            )

    def begin(
        self, block: nn.Module, groups: Sequence[Group], original: Callable[[], nn.Module] | None = None
    ) -> StagedBlock:
        """Begin the forward of the block at `position`; groups: all layer groups of the block, at least one.

        original: loads the block once more, whose weights are not replaced.
        """
        hidden, self._hidden = self._hidden, {}
        self.staged = StagedBlock(self.architecture, block, self.position, groups, hidden, self._cut, self._wanted)
        if self._original is not None:
            assert original is not None
            hidden, self._original = self._original, {}
            self._original_staged = StagedBlock(
                self.architecture,
                original(),
                self.position,
                groups,
                hidden,
                self._cut,
                self._wanted,
                is_original=True,
            )
        return self.staged

    def collect_stage(self, stage: int, keys: Collection[str]) -> dict[str, Tree]:
        """See StagedBlock.collect."""
        assert self.staged is not None
        return self.staged.collect(stage, keys, self._original_staged)

    def finish(self) -> None:
        """End the forward that was begun: its outputs are the hidden states of the next block."""
        assert self.staged is not None
        self._hidden, self.staged = self.staged.finish(), None
        if self._original_staged is not None:
            self._original, self._original_staged = self._original_staged.finish(), None
        self.position += 1

    def _mixtures(self, groups: Sequence[Group]) -> dict[str, list[int]]:
        """Paths of modules whose experts' statistics are of all tokens, and the numbers of these experts."""
        stages: dict[str, Stage] = {}
        for group in groups:
            if group.is_expert and self.architecture.all_experts:
                stages[container((group,))] = (*stages.get(container((group,)), ()), group)
        return {path: members_of(stage) for path, stage in stages.items()}

    @staticmethod
    def _watch(block: nn.Module, group: Group, sums: ChunkSums, stop: bool) -> torch.utils.hooks.RemovableHandle:
        # Layers of a group share their input, so a hook on the first one suffices.
        layer = group.layers[0]

        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            forward = current_forward()
            assert isinstance(forward, _ChunkForward)
            if forward.collects or not group.is_expert:
                sums.add(group, forward.chunk, inputs[0])
            if stop:
                raise _AllCollected

        # Behind the hook with which a divided layer waits for its weight: only there are forwards in their order.
        return block.get_submodule(layer.module).register_forward_pre_hook(add)


def _show_all(experts: Any, members: Sequence[int]) -> Callable[[], None]:
    """Let experts be called with all tokens for their inputs, before the routed ones run; returns what undoes it."""
    usual = experts.forward

    def forward(*arguments: Tensor, **named: Tensor) -> Tensor:
        run = current_forward()
        run.collects = True
        experts.show(members, *arguments, **named)
        run.collects = False
        output: Tensor = usual(*arguments, **named)
        return output

    experts.forward = forward
    return lambda: delattr(experts, "forward")
