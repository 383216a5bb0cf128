"""Second moments of layer inputs, summed so that the result does not depend on who summed what.

Floating-point addition is not associative. The calibration sequences are therefore cut into chunks once, each chunk's
sum is made by one process in one order, and sums are added along one binary tree over the chunks: any split of the
chunks over any number of workers gives the same bits.
"""

import warnings
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Columns of one panel: large enough for the matrix product to run at full speed.
_PANEL = 256


@dataclass
class SecondMoment:
    """Sum of x xᵀ over tokens, (C, C) float32, of which only the panels on and below the diagonal are kept.

    panels: panel p holds rows [p * 256, (p + 1) * 256) and the columns up to its last row; there are none before the
    first tokens. tokens: how many were added.
    """

    columns: int
    panels: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, inputs: Tensor) -> None:
        """Add the rows of inputs (N, C)."""
        inputs = inputs.float()
        bounds = _panels(self.columns)
        if not self.panels:
            self.panels = [inputs.new_zeros(stop - start, stop) for start, stop in bounds]
        for (start, stop), panel in zip(bounds, self.panels, strict=True):
            panel.addmm_(inputs[:, start:stop].T, inputs[:, :stop])
        self.tokens += len(inputs)

    def merge(self, other: "SecondMoment") -> None:
        """Add another sum to this one."""
        for index, theirs in enumerate(other.panels):
            # Out of place: a panel may be borrowed from the object store, where nothing can be written.
            self.panels[index] = self.panels[index] + theirs.to(self.panels[index].device)
        self.tokens += other.tokens

    def diagonal(self) -> Tensor:
        """E[x²] of every column, (C,) float32; zero without tokens."""
        parts = [
            panel[:, start:].diagonal() for (start, _), panel in zip(_panels(self.columns), self.panels, strict=True)
        ]
        return torch.cat(parts) / max(1, self.tokens)

    def mean(self, order: Tensor) -> Tensor:
        """E[x xᵀ] with rows and columns in this order (C,), (C, C) float32."""
        place = torch.empty_like(order)
        place[order] = torch.arange(self.columns, device=order.device)
        full = torch.empty(self.columns, self.columns, device=self.panels[0].device)
        for (start, stop), panel in zip(_panels(self.columns), self.panels, strict=True):
            rows, columns = place[start:stop], place[:stop]
            full[rows[:, None], columns[None, :]] = panel
            full[columns[:, None], rows[None, :]] = panel.T
        return full.div_(max(1, self.tokens))

    def to(self, device: torch.device | str) -> "SecondMoment":
        """The sum on a device; itself where it is there already."""
        return SecondMoment(self.columns, [panel.to(device) for panel in self.panels], self.tokens)

    def arrays(self) -> list[np.ndarray]:
        """The panels as numpy arrays, which travel through an object store without a copy."""
        return [panel.cpu().numpy() for panel in self.panels]

    @classmethod
    def from_arrays(cls, columns: int, arrays: list[np.ndarray], tokens: int) -> "SecondMoment":
        """The sum that arrays() described, sharing its memory, which is never written to."""
        return cls(columns, [_borrow(array) for array in arrays], tokens)


def _borrow(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # Arrays in an object store are read-only, of which torch warns; nothing here writes to a borrowed panel.
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def _panels(columns: int) -> list[tuple[int, int]]:
    return [(start, min(columns, start + _PANEL)) for start in range(0, columns, _PANEL)]


class Tree:
    """Sums of chunks, merged pairwise along the one binary tree over all chunks.

    A node (start, size) is the sum of chunks start … start + size - 1, size a power of two that divides start. Merging
    two siblings changes the left one.
    """

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], SecondMoment] = {}

    def add(self, start: int, size: int, total: SecondMoment) -> None:
        """Add a node and merge as far as siblings are there."""
        while True:
            left = start - start % (2 * size)
            sibling = self.nodes.pop((left if left != start else start + size, size), None)
            if sibling is None:
                self.nodes[start, size] = total
                return
            if left == start:
                total.merge(sibling)
            else:
                sibling.merge(total)
                total = sibling
            start, size = left, 2 * size

    def total(self) -> SecondMoment:
        """Sum of all nodes; without a full tree the remaining ones are added by their start."""
        ordered = [self.nodes[key] for key in sorted(self.nodes)]
        first = ordered[0]
        for other in ordered[1:]:
            first.merge(other)
        return first


def split(items: int, parts: int) -> list[range]:
    """Cut items into parts contiguous ranges whose lengths differ by at most one; empty ones are left out."""
    bounds = [round(part * items / parts) for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds) if b > a]
