"""The checkpoint as transforms leave it: every reader gets the edited tensors.

Architecture, solves, output folders and searches read tensors from a Checkpoint only, so this one place applies the
edits for all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hasten.accel.compression.transforms.edits import OUTSIDE, Edit, EditFolder, Edits, edited
from hasten.accel.models.architecture import Architecture
from hasten.accel.models.checkpoint import Checkpoint
from hasten.accel.models.checkpoint_view import CheckpointView


class TransformedCheckpoint(CheckpointView):
    """A checkpoint whose tensors are edited when they are read; names, shapes and dtypes are the original's.

    No tensor can be read before `locate`.
    """

    def __init__(self, source: Checkpoint, folder: EditFolder) -> None:
        super().__init__(source)
        self.folder = folder
        self._block_of: dict[str, int] | None = None
        # Edits in place of those in the folder, by block.
        self._instead: dict[int, Edits] = {}

    def locate(self, architecture: Architecture) -> None:
        """Note which tensors are in which block of an architecture of this checkpoint."""
        blocks = range(architecture.num_blocks)
        self._block_of = {name: block for block in blocks for name in architecture.block_tensors(block)}

    @contextmanager
    def with_edits(self, block: int, edits: Edits) -> Iterator[None]:
        """A block's edits in place of those that the folder holds or will hold."""
        self._instead[block] = edits
        try:
            yield
        finally:
            del self._instead[block]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See Checkpoint."""
        edits = self._edits(name)
        if not edits:
            return self.source.tensor(name, dtype)
        stored = self.source.tensor(name)
        return edited(stored, edits).to(dtype or stored.dtype)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """See Checkpoint."""
        stored = self.source.rows(name, index)
        rows: Tensor | None = stored
        for edit in self._edits(name):
            rows = None if rows is None else edit.apply_to_rows(rows.float(), index)
        return self.tensor(name)[index] if rows is None else rows.to(stored.dtype)

    def _edits(self, name: str) -> list[Edit]:
        assert self._block_of is not None
        block = self._block_of.get(name, OUTSIDE)
        edits = self._instead[block] if block in self._instead else self.folder.read(block)
        return list(edits.get(name, ()))
