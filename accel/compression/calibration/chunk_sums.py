"""Statistics of several chunks of the calibration sequences, summed while forwards of all chunks go through a block."""

from dataclasses import dataclass

from torch import Tensor

from hasten.accel.activations.ranges import InputRange
from hasten.accel.compression.calibration.layer_groups import Group
from hasten.accel.compression.calibration.statistics import Hessian, Tree


@dataclass(frozen=True)
class Wanted:
    """What the calibration pass collects of the inputs of layers: Hessians, and ranges, those with a histogram.

    attention: whether it collects the ranges of the attentions' queries, keys and values. magnitudes: whether those of
    the inputs come with the Hessians.
    """

    hessian: bool = True
    ranges: bool = False
    histogram: bool = False
    attention: bool = False
    magnitudes: bool = False


class ChunkSums:
    """Hessians by layer group, each in a tree over chunks, and ranges. cut: see statistics.Tree.

    Chunks of a group come one after another, so that a chunk's sum is merged with others when the next one begins.
    ranges: by Group.range_key; experts of a block share them.
    """

    def __init__(self, cut: int = 0, wanted: Wanted | None = None) -> None:
        self._cut, self._wanted = cut, wanted or Wanted()
        self.ranges: dict[str, InputRange] = {}
        self._trees: dict[str, Tree] = {}
        self._current: dict[str, tuple[int, Hessian]] = {}

    def add(self, group: Group, chunk: int, inputs: Tensor, original: Tensor | None = None) -> None:
        """Add inputs (…, C) of a group's layers. original: the same inputs in the original model, for the shift."""
        key, columns = group.key, group.columns
        rows = inputs.reshape(-1, columns)
        if not len(rows):
            return
        if self._wanted.ranges:
            self.ranges.setdefault(group.range_key, InputRange(self._wanted.histogram)).add(rows)
        if not self._wanted.hessian:
            return
        if key in self._current and self._current[key][0] != chunk:
            self._close(key)
        if key not in self._current:
            self._current[key] = chunk, Hessian(columns)
        hessian = self._current[key][1]
        hessian.add(rows)
        if self._wanted.magnitudes:
            hessian.add_magnitudes(rows)
        if original is not None:
            hessian.add_shift(rows, original.reshape(-1, columns))

    def trees(self) -> dict[str, Tree]:
        """The sums of groups that had inputs, by key; nothing can be added to them any more."""
        for key in list(self._current):
            self._close(key)
        return self._trees

    def _close(self, key: str) -> None:
        chunk, hessian = self._current.pop(key)
        self._trees.setdefault(key, Tree(self._cut)).add(chunk, 1, hessian)
