"""Hessians of layer inputs, summed so that the result does not depend on the number of workers.

Floating-point addition is not associative. The calibration sequences are therefore cut into chunks once, the sum of a
chunk is computed by one process in one order, and sums are added along one binary tree over the chunks: any split of
the chunks over any number of workers gives the same bits.
"""

import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hasten.kernels import second_moment


class Hessian:
    """H = E[x xᵀ], half the Hessian of a layer's squared output error.

    Stored as the sum of x xᵀ over tokens, in panels: blocks of rows with the columns up to the end of their diagonal.

    columns: C. tokens: number of tokens in the sum. halves: Hessians of two halves of the tokens, whose sum this is;
    None where they are not known. magnitudes: sum and maximum of |x| of every column, (2, C) float32. shift: sum of
    (x' - x) xᵀ, (C, C) float32, where x' is the layer's input in the original model. Both are None where they were not
    collected.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.tokens = 0
        self.halves: tuple[Hessian, Hessian] | None = None
        self.magnitudes: Tensor | None = None
        self.shift: Tensor | None = None
        self._width = panel_width(columns)
        self._bounds = panel_bounds(columns)
        # All panels, concatenated: one block so large that the allocator returns it to the system when it is freed.
        self._sums: Tensor | None = None
        self._is_borrowed = False
        # Sums in an object store are read-only: they are added lazily, whenever a panel is read.
        self._terms: tuple[Hessian, Hessian] | None = None

    def add(self, inputs: Tensor) -> None:
        """Add the rows of inputs (N, C)."""
        if self._sums is None:
            size = sum((stop - start) * stop for start, stop in self._bounds)
            self._sums = torch.zeros(size, device=inputs.device)
        second_moment.add(self._sums, inputs, self._width)
        self.tokens += len(inputs)

    def add_magnitudes(self, inputs: Tensor) -> None:
        """Add the rows of inputs (N, C) to the magnitudes."""
        absolute = inputs.float().abs()
        self.magnitudes = _joined_magnitudes(self.magnitudes, torch.stack([absolute.sum(0), absolute.amax(0)]))

    def add_shift(self, inputs: Tensor, original: Tensor) -> None:
        """Add the rows of inputs (N, C), and of the same tokens' inputs in the original model, to the shift."""
        inputs = inputs.float()
        product = (original.float() - inputs).T @ inputs
        self.shift = product if self.shift is None else self.shift.add_(product)

    def merge(self, other: "Hessian") -> None:
        """Add another Hessian's sum to this one."""
        self.magnitudes = _joined_magnitudes(self.magnitudes, other.magnitudes)
        self.shift = _sum_of(self.shift, other.shift)
        if self._sums is not None and other._sums is not None and not self._is_borrowed:
            self._sums += other._sums
        else:
            left = Hessian(self.columns)
            left._sums, left._is_borrowed, left._terms = self._sums, self._is_borrowed, self._terms
            self._sums, self._terms = None, (left, other)
        self.tokens += other.tokens

    def panels(self) -> Iterator[Tensor]:
        """The panels: rows start … stop - 1 with the columns before stop, (stop - start, stop) float32."""
        if self._terms is not None:
            for left, right in zip(self._terms[0].panels(), self._terms[1].panels(), strict=True):
                yield left + right
        elif self._sums is not None:
            yield from second_moment.panels(self._sums, self.columns, self._width)

    def diagonal(self) -> Tensor:
        """E[x²] of every column, (C,) float32."""
        parts = [panel[:, start:].diagonal() for (start, _), panel in zip(self._bounds, self.panels(), strict=True)]
        return torch.cat(parts) / self.tokens

    def mean(self, order: Tensor) -> Tensor:
        """E[x xᵀ], (C, C) float32, with rows and columns in the given order (C,)."""
        place = torch.empty_like(order)
        place[order] = torch.arange(self.columns, device=order.device)
        full = torch.empty(self.columns, self.columns, device=order.device)
        for (start, _), panel in zip(self._bounds, self.panels(), strict=True):
            second_moment.spread(panel, start, place, self.tokens, full)
        return full

    def power(self, weight: Tensor) -> Tensor:
        """Mean squared output of every row of weight (R, C) float32, (R,) float32."""
        # Panels hold H up to the diagonal: the part left of a panel's diagonal square stands for two halves of H.
        total = weight.new_zeros(len(weight))
        for (start, stop), panel in zip(self._bounds, self.panels(), strict=True):
            outputs = weight[:, start:stop] @ panel
            outputs[:, :start] *= 2
            total += outputs.mul_(weight[:, :stop]).sum(1)
        return total.div_(self.tokens).clamp_(min=0)

    @classmethod
    def of_halves(cls, first: "Hessian", second: "Hessian") -> "Hessian":
        """Sum of the Hessians of two halves of the tokens, which are kept."""
        total = cls(first.columns)
        total._terms, total.tokens = (first, second), first.tokens + second.tokens
        total.halves = (first, second)
        total.magnitudes = _joined_magnitudes(first.magnitudes, second.magnitudes)
        total.shift = _sum_of(first.shift, second.shift)
        return total

    def to(self, device: torch.device | str) -> "Hessian":
        """The Hessian on a device; itself where it is on that device already."""
        if all(panel.device == torch.device(device) for panel in self.panels()):
            return self
        if self.halves is not None:
            return Hessian.of_halves(*(half.to(device) for half in self.halves))
        moved = Hessian(self.columns)
        moved._sums = torch.cat([panel.to(device).flatten() for panel in self.panels()])
        moved.tokens = self.tokens
        moved.magnitudes = None if self.magnitudes is None else self.magnitudes.to(device)
        moved.shift = None if self.shift is None else self.shift.to(device)
        return moved

    def array(self) -> np.ndarray:
        """The panels as one numpy array, which an object store transfers without a copy."""
        if self._sums is None:
            return torch.cat([panel.flatten() for panel in self.panels()]).cpu().numpy()
        return self._sums.cpu().numpy()

    def others(self) -> dict[str, np.ndarray]:
        """The further statistics that were collected, by name."""
        values = {"magnitudes": self.magnitudes, "shift": self.shift}
        return {name: value.cpu().numpy() for name, value in values.items() if value is not None}

    @classmethod
    def from_array(
        cls, columns: int, array: np.ndarray, tokens: int, others: Mapping[str, np.ndarray] | None = None
    ) -> "Hessian":
        """The Hessian whose array() and others() these are; it shares their memory and never writes to it."""
        hessian = cls(columns)
        with warnings.catch_warnings():
            # torch warns of read-only arrays; a borrowed sum is never written to.
            warnings.simplefilter("ignore")
            hessian._sums = torch.from_numpy(array)
            for name, value in (others or {}).items():
                setattr(hessian, name, torch.from_numpy(value))
        hessian._is_borrowed, hessian.tokens = True, tokens
        return hessian


def _joined_magnitudes(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return torch.stack([first[0] + second[0], torch.maximum(first[1], second[1])])


def _sum_of(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    # Not in place: it may be read-only.
    return first + second


def panel_width(columns: int) -> int:
    """Rows of a panel: narrow panels waste less beyond the diagonal, wide ones compute faster."""
    return 128 if columns <= 512 else 256


def panel_bounds(columns: int) -> list[tuple[int, int]]:
    """First row and end row of every panel of a Hessian."""
    return second_moment.panel_bounds(columns, panel_width(columns))


class Tree:
    """Hessians of chunks, merged pairwise along one binary tree over all chunks.

    A node (start, size) is the sum of chunks start … start + size - 1; size is a power of two and divides start.
    Merging two siblings changes the left one in place. cut: chunks before it and from it on are two halves, whose sums
    are not merged; 0 for one sum.
    """

    def __init__(self, cut: int = 0) -> None:
        self.cut = cut
        self.nodes: dict[tuple[int, int], Hessian] = {}

    def add(self, start: int, size: int, total: Hessian) -> None:
        """Add a node, and merge it with its sibling as long as there is one."""
        while True:
            left = start - start % (2 * size)
            if left < self.cut < left + 2 * size:
                self.nodes[start, size] = total
                return
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

    def total(self) -> Hessian:
        """Sum of all nodes; where the tree is not full, the remaining nodes are added in order of their start."""
        ordered = sorted(self.nodes)
        halves = [
            _sum([self.nodes[key] for key in half])
            for half in ([key for key in ordered if key[0] < self.cut], [key for key in ordered if key[0] >= self.cut])
            if half
        ]
        return Hessian.of_halves(*halves) if len(halves) == 2 else halves[0]


def _sum(hessians: list[Hessian]) -> Hessian:
    first, *others = hessians
    for other in others:
        first.merge(other)
    return first


def split(items: int, parts: int) -> list[range]:
    """Cut `items` items into `parts` contiguous ranges whose lengths differ by at most one; empty ones are omitted."""
    bounds = [round(part * items / parts) for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds) if b > a]
