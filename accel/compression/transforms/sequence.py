"""The transforms of a run, in their order: which statistics they need of a block, and the edits that they make."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.statistics import Hessian
from hasten.accel.compression.method import Method
from hasten.accel.compression.transforms.base import BlockTransform, BlockView, Part
from hasten.accel.compression.transforms.edits import OUTSIDE, EditFolder, Edits, joined
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint

S = TypeVar("S")
# collect(number, keys, edits): statistics of groups of a block with these edits, for the transform of this number.
Collect = Callable[[int, list[str], Edits], S]
# solve(number, parts, collected, edits, statistics): the edits of each part of a transform, by the part's key.
Solve = Callable[[int, Sequence[Part], Edits, Edits, S | None], Mapping[str, Edits]]


class TransformSequence:
    """The transforms of a run that make edits, and the folder of the edits.

    architecture, checkpoint: the original. methods: that compress the layers. expert_tokens: see BlockView.
    """

    def __init__(
        self,
        transforms: Sequence[BlockTransform],
        folder: EditFolder,
        checkpoint: Checkpoint,
        layer_groups: Sequence[Sequence[Group]],
        methods: Sequence[Method],
        expert_tokens: int,
        device: str,
    ) -> None:
        self.transforms = [transform for transform in transforms if transform.makes_edits]
        self.folder = folder
        self._checkpoint, self._layer_groups, self._methods = checkpoint, layer_groups, methods
        self._expert_tokens, self._device = expert_tokens, device

    def unfinished(self, block: int) -> list[int]:
        """Blocks up to a block whose edits are not written, OUTSIDE first."""
        return [number for number in range(OUTSIDE, block + 1) if not self.folder.is_written(number)]

    def view(
        self,
        architecture: Architecture,
        block: int,
        collected: Edits,
        edits: Edits,
        statistics: Mapping[str, Hessian],
    ) -> BlockView:
        """The block as a transform finds it, see BlockView."""
        return BlockView(
            block,
            architecture,
            self._checkpoint,
            self._layer_groups[block],
            self._methods,
            collected,
            edits,
            statistics,
            self._expert_tokens,
            self._device,
        )

    def write(self, architecture: Architecture, block: int, collect: Collect[S], solve: Solve[S]) -> None:
        """Make and write the edits of a block, or of what lies OUTSIDE the blocks."""
        if block == OUTSIDE:
            self.folder.write(block, joined([transform.outside(architecture) for transform in self.transforms]))
            return
        collected: Edits = {}
        edits: Edits = {}
        statistics: S | None = None
        for number, transform in enumerate(self.transforms):
            view = self.view(architecture, block, collected, edits, {})
            parts = transform.parts(view)
            if not parts:
                continue
            if transform.needs_statistics and (statistics is None or not _keeps_magnitudes(edits)):
                collected, edits = joined([collected, edits]), {}
                statistics = collect(number, self._keys(view, number), collected)
            solved = solve(number, parts, collected, edits, statistics)
            edits = joined([edits, *(solved[part.key] for part in parts)])
        self.folder.write(block, joined([collected, edits]))

    def _keys(self, view: BlockView, number: int) -> list[str]:
        """Keys of the groups whose statistics this transform and later ones need."""
        needing = [transform for transform in self.transforms[number:] if transform.needs_statistics]
        keys = {key for transform in needing for part in transform.parts(view) for key in part.groups}
        return [group.key for group in view.groups if group.key in keys]


def _keeps_magnitudes(edits: Edits) -> bool:
    return all(edit.keeps_magnitudes for of_tensor in edits.values() for edit in of_tensor)
