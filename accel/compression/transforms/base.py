"""Base class of block transforms, and what they see of a block.

A transform changes a block before its layers are compressed, so that they lose less, by edits of stored tensors that
leave the block's function as it is. It is solved part by part, in any process, from statistics of the uncompressed
block; see cluster/programs/block_transforms.py for the order of events.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.method import Method
from hasten.accel.compression.result import CompressedWeight, Result
from hasten.accel.compression.transforms.edits import Edit, Edits, edited, joined
from hasten.accel.costs.estimate import Work
from hasten.accel.errors import UserError
from hasten.accel.models.architecture import Architecture, Layer
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.scale_sites import ScaleSite


@dataclass(frozen=True)
class GroupInputs:
    """Statistics of the input of a group's layers, as it is after the edits so far.

    hessian: of the input when it was collected. edits: of the layers' weights since.
    """

    hessian: Hessian
    edits: tuple[Edit, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens in the statistics."""
        return self.hessian.tokens

    def power(self, weight: Tensor) -> Tensor:
        """Mean squared output of every row of weight (R, C) float32, (R,) float32."""
        for edit in reversed(self.edits):
            weight = edit.before(weight)
        return self.hessian.power(weight)

    def mean(self) -> Tensor:
        """Mean magnitude of every column, (C,) float32."""
        assert self.hessian.magnitudes is not None
        mean = self.hessian.magnitudes[0] / self.hessian.tokens
        for edit in self.edits:
            mean = edit.mean_input(mean)
        return mean

    def peak(self) -> Tensor:
        """Largest magnitude of every column, (C,) float32."""
        assert self.hessian.magnitudes is not None
        peak = self.hessian.magnitudes[1]
        for edit in self.edits:
            peak = edit.peak_input(peak)
        return peak


@dataclass(frozen=True)
class BlockView:
    """A block, as one transform of several finds it.

    groups: its layers that are compressed. methods: that compress them. collected: edits of earlier transforms that the
    block had when its statistics were collected. edits: of earlier transforms, since. statistics: by group key; experts
    that no token reached have none. checkpoint: the original. expert_tokens: of experts that saw fewer tokens, the
    statistics are noise.
    """

    block: int
    architecture: Architecture
    checkpoint: Checkpoint
    groups: Sequence[Group]
    methods: Sequence[Method]
    collected: Edits
    edits: Edits
    statistics: Mapping[str, Hessian]
    expert_tokens: int = 0
    device: str = "cpu"

    @cached_property
    def sites(self) -> list[ScaleSite]:
        """Where inputs of layers can be scaled, where one of the layers is compressed."""
        compressed = {layer.name for group in self.groups for layer in group.layers}
        sites = self.architecture.scale_sites(self.block)
        return [site for site in sites if any(layer.name in compressed for layer in site.layers)]

    def groups_of(self, site: ScaleSite) -> list[Group]:
        """The compressed groups that read a site."""
        names = {layer.name for layer in site.layers}
        return [group for group in self.groups if any(layer.name in names for layer in group.layers)]

    def tensor(self, name: str) -> Tensor:
        """A tensor with the edits so far, float32."""
        edits = joined([self.collected, self.edits]).get(name, ())
        return edited(self.checkpoint.tensor(name).to(self.device), edits).float()

    def inputs(self, group: Group) -> GroupInputs | None:
        """Statistics of a group's input; None where there are none, or too few tokens."""
        hessian = self.statistics.get(group.key)
        if hessian is None or (group.is_expert and hessian.tokens < self.expert_tokens):
            return None
        edits = self.edits.get(f"{group.key}.weight", ())
        return GroupInputs(hessian.to(self.device), tuple(edits))

    def rounded(self, group: Group, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights (R, C) float32 of a group's layers at its level, compressed without statistics: fast, for searches.

        weights: float32, by name of the layer, whose stored dtype is that of the scales.
        """
        level = group.level
        method, _ = level.without_statistics(level.method_of(self.methods))

        def read(layer: Layer) -> Tensor:
            return weights[layer.name].to(self.checkpoint.dtype(f"{layer.name}.weight"))

        solved = level.solve(method, group.layers, read, method.prepare(None), self.device)
        return {name: level.dense(result.weight).to(self.device, torch.float32) for name, result in solved.items()}


@dataclass(frozen=True)
class Part:
    """A part of a block that is solved alone. groups: keys of the groups whose statistics it reads. cost: relative."""

    key: str
    groups: tuple[str, ...] = ()
    cost: float = 1.0


class BlockTransform:
    """A transform. Subclasses are frozen dataclasses of hyper-parameters.

    makes_edits: whether it has parts that are solved. needs_statistics: whether `edits` reads statistics of the block.
    needs_original: whether the calibrators run the original model, too: for the shift of the layers' inputs, which
    `target_change` reads, or for `solve_block`. solves_blocks: whether it compresses the layers of a block together, by
    `solve_block`; block_bytes: memory that this needs for each weight. needs_tokens: whether it reads calibration
    tokens before the first block. is_everywhere: whether it also edits blocks without compressed layers, and tensors
    outside the blocks.
    """

    makes_edits: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = False
    needs_original: ClassVar[bool] = False
    is_everywhere: ClassVar[bool] = False
    solves_blocks: ClassVar[bool] = False
    block_bytes: ClassVar[int] = 0
    needs_tokens: ClassVar[bool] = False

    def check(self, architecture: Architecture, earlier: Sequence["BlockTransform"]) -> None:
        """UserError where the model cannot be transformed. earlier: transforms before this one."""
        if self.is_everywhere and any(transform.needs_statistics for transform in earlier):
            name = type(self).__name__.lower()
            raise UserError(f"transforms: {name} changes the whole model, so it must come before the others")

    def parts(self, view: BlockView) -> Sequence[Part]:
        """The parts of a block that are solved, each by a call of `edits`; statistics are not collected yet."""
        return ()

    def edits(self, view: BlockView, key: str) -> Edits:
        """Edits of a part, by tensor; a function of the view alone, since any process may solve it, also twice."""
        raise NotImplementedError

    def outside(self, architecture: Architecture) -> Edits:
        """Edits of tensors outside the blocks."""
        return {}

    def solve_block(
        self,
        architecture: Architecture,
        block: int,
        groups: Sequence[Group],
        quantizer: object,
        inputs: Tensor,
        targets: Tensor,
    ) -> dict[str, Result[CompressedWeight]]:
        """Compressed layers of all groups of a block, by name.

        quantizer: the run's. inputs, targets (N, T, D): of the block in the compressed model, and outputs of the
        original model.
        """
        raise NotImplementedError

    def cost(self, groups: Sequence[Group], gpu_memory: int = 0) -> Work:
        """Work of solving a block whose compressed groups these are; statistics and further runs are not included."""
        return Work()

    def block_cost(self, weights: int, sequences: int, run: Callable[[int], Work]) -> Work:
        """Work of `solve_block`, in one process. run: work of the block's forward on so many sequences."""
        return Work()

    def target_change(self, hessian: Hessian) -> Tensor | None:
        """A matrix M (C, C) float32: layers are compressed towards W (I + M) in place of W; None for W itself.

        hessian: of the layers' input. Called for every group of layers, if needs_original.
        """
        return None


def block_solver(transforms: Sequence[BlockTransform]) -> BlockTransform | None:
    """The transform that compresses the layers of a block together, if there is one."""
    return next((transform for transform in transforms if transform.solves_blocks), None)


def target_change(transforms: Sequence[BlockTransform], hessian: Hessian | None, device: str = "cpu") -> Tensor | None:
    """The sum of the transforms' changes of the targets of layers, see BlockTransform.target_change; None for none."""
    if hessian is None or hessian.shift is None:
        return None
    moved = hessian.to(device)
    changes = [transform.target_change(moved) for transform in transforms if transform.needs_original]
    used = [change for change in changes if change is not None]
    return torch.stack(used).sum(0) if used else None
