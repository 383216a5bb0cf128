"""A micro-batch that is divided over processes: means and random numbers are those of the whole one.

Each process has equally many windows, but not equally many predicted tokens. A loss that is a mean over tokens calls
`mean`, so that the average over the processes, and that of the gradients, is what one process finds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


def _itself(own: Tensor) -> Tensor:
    return own


@dataclass(frozen=True)
class Division:
    """The part of a process. total: the sum of a tensor without gradient over all `size` processes, of all the same."""

    rank: int = 0
    size: int = 1
    total: Callable[[Tensor], Tensor] = _itself

    def part(self, numbers: Sequence[int]) -> Sequence[int]:
        """The own part of a micro-batch, whose length `size` divides."""
        count = len(numbers) // self.size
        return numbers[self.rank * count : (self.rank + 1) * count]


WHOLE = Division()
_CURRENT: ContextVar[Division] = ContextVar("division", default=WHOLE)


@contextmanager
def divided(division: Division) -> Iterator[None]:
    """Losses that are computed inside are of a part of the micro-batch."""
    token = _CURRENT.set(division)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def mean(total: Tensor, count: Tensor | float, least: float = 1.0) -> Tensor:
    """total / count over all processes, for sums over the own part; their average over the processes is the mean.

    least: the smallest count that is divided by. All processes must call it equally often.
    """
    division = _CURRENT.get()
    counts = division.total(torch.as_tensor(count, dtype=torch.float32, device=total.device).detach().clone())
    return total * division.size / counts.clamp(min=least)


def rand(rows: int, columns: int, device: torch.device) -> Tensor:
    """Uniform random numbers (rows, columns) of the own rows, as torch's generator gives them for the whole batch."""
    division = _CURRENT.get()
    numbers = torch.rand(rows * division.size, columns, device=device)
    return numbers[division.rank * rows : (division.rank + 1) * rows]
