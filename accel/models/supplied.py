"""Weights of a block's linear layers that are not in the block: each is brought when its layer runs, and dropped then.

Forwards of a block wait where they need such a weight. It is brought once for all of them, so that a process holds one
layer of those at a time, and every weight moves once for each time that a block runs on all sequences. The arithmetic
is that of a block with all its weights, bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accel.models.forwards import Forward, current_forward, in_forward


class SuppliedWeights(ABC):
    """Weights of some of a block's linear layers, by number in the order in which the block runs them.

    It refers to no module of the block, so that a block is freed as soon as it is dropped.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._numbers: dict[str, int] = {}
        self._weight: Tensor | None = None

    def __contains__(self, path: str) -> bool:
        return path in self._numbers

    def supply(self, forwards: Sequence[Forward]) -> None:
        """Let forwards that wait for weights go on, until none waits for one. They run layers in their order."""
        while (number := self.next_layer(forwards)) is not None:
            self._weight = self.bring(number)
            for forward in forwards:
                if forward.layer == number:
                    forward.layer = None
                    forward.switch()
            self._weight = None

    def next_layer(self, forwards: Sequence[Forward]) -> int | None:
        """The first layer that a forward waits for; None where all have ended or wait for something else."""
        return min((forward.layer for forward in forwards if forward.layer is not None), default=None)

    @abstractmethod
    def bring(self, number: int) -> Tensor:
        """Weight (R, C) of a layer, on the device and in the dtype of the block."""

    def _add(self, path: str, layer: nn.Linear, alone: bool) -> None:
        """Take a layer's weight out of the block. path: in it. alone: whether it can be called outside a Forward."""
        number = self._numbers[path] = len(self._numbers)
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        layer.weight = nn.Parameter(empty, requires_grad=False)

        def take(module: Any, inputs: object) -> None:
            if alone and not in_forward():
                module.weight.data = self.bring(number)
                return
            forward = current_forward()
            forward.layer = number
            forward.pause()
            module.weight.data = self._weight

        def drop(module: Any, inputs: object, output: object) -> None:
            module.weight.data = empty

        layer.register_forward_pre_hook(take)
        layer.register_forward_hook(drop)


class ReadWeights(SuppliedWeights):
    """Weights that are read, or unpacked, whenever their layers run."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._reads: list[Callable[[], Tensor]] = []

    def add(self, path: str, layer: nn.Linear, read: Callable[[], Tensor]) -> None:
        """Add a layer, whose path in the block is `path`. read: gives its weight (R, C), in any dtype."""
        self._add(path, layer, alone=True)
        self._reads.append(read)

    def replace(self, path: str, read: Callable[[], Tensor]) -> None:
        """Replace what gives a layer's weight."""
        self._reads[self._numbers[path]] = read

    def bring(self, number: int) -> Tensor:
        """See SuppliedWeights."""
        return self._reads[number]().to(self._device, self._dtype)
