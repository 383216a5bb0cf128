"""Hessians of several chunks of the calibration sequences, summed while forwards of all chunks go through a block."""

from torch import Tensor

from hasten.accel.compression.calibration.statistics import Hessian, Tree


class ChunkSums:
    """Hessians by layer group, each in a tree over chunks. cut: see statistics.Tree. magnitudes: whether to sum them.

    Chunks of a group come one after another, so that a chunk's sum is merged with others when the next one begins.
    """

    def __init__(self, cut: int = 0, magnitudes: bool = False) -> None:
        self._cut, self._magnitudes = cut, magnitudes
        self._trees: dict[str, Tree] = {}
        self._current: dict[str, tuple[int, Hessian]] = {}

    def add(self, key: str, columns: int, chunk: int, inputs: Tensor, original: Tensor | None = None) -> None:
        """Add inputs (…, C) of a group's layers. original: the same inputs in the original model, for the shift."""
        rows = inputs.reshape(-1, columns)
        if not len(rows):
            return
        if key in self._current and self._current[key][0] != chunk:
            self._close(key)
        if key not in self._current:
            self._current[key] = chunk, Hessian(columns)
        hessian = self._current[key][1]
        hessian.add(rows)
        if self._magnitudes:
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
