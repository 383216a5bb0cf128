"""Exchange of weights between the processes that a block is divided over."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

# Before torch 2.13 it has another name, of which torch 2.13 warns.
_all_gather: Any = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


class Exchange(ABC):
    """Collective operations: all ranks call the same ones in the same order.

    rank, size: this process's number, and the number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @abstractmethod
    def minimum(self, number: int) -> int:
        """The smallest of all ranks' numbers."""

    @abstractmethod
    def gather(self, part: Tensor) -> Tensor:
        """The ranks' parts (R, C) below each other, (size * R, C); all have one shape, dtype and kind of device."""


class ProcessExchange(Exchange):
    """Ranks of torch.distributed's default group. control: a gloo group of the same ranks, for numbers.

    A rank may wait in `minimum` for as long as another one is busy with something else, so `control` should have no
    short timeout.
    """

    def __init__(self, control: Any) -> None:
        super().__init__(torch.distributed.get_rank(), torch.distributed.get_world_size())
        self._control = control

    def minimum(self, number: int) -> int:
        """See Exchange."""
        smallest = torch.tensor(number)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=self._control)
        return int(smallest)

    def gather(self, part: Tensor) -> Tensor:
        """See Exchange."""
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * len(part), *part.shape[1:])
        # As bytes, because gloo does not know all dtypes.
        _all_gather(whole.view(torch.uint8), part.contiguous().view(torch.uint8))
        return whole
