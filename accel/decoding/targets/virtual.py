"""Virtual tokens: inputs of a target that are no ids of its vocabulary, such as trained prompt tokens.

In a pass they are nodes of the tree, behind the draft's, with the ids V, V + 1, … of a target of vocabulary V. A state
of their own replaces theirs before one of the target's layers; from there on they run as any other node. They are never
committed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class VirtualTokens(ABC):
    """The virtual tokens of a target. layers: number of decoder layers that each one skips; 0 enters as an embedding.

    Below that layer a virtual token's row holds nothing of meaning, and later nodes below it must not need it.
    """

    layers: Sequence[int]

    def __len__(self) -> int:
        return len(self.layers)

    @abstractmethod
    def states(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Hidden states (N, D) of tokens (N,) that skip equally many layers.

        anchors: (N, D), the states at that layer of the nodes with a real token which they hang on.
        """


@dataclass(frozen=True, eq=False)
class EmbeddedTokens(VirtualTokens):
    """Virtual tokens with embeddings of their own. table: (R, D)."""

    table: Tensor

    @property
    def layers(self) -> Sequence[int]:  # type: ignore[override]
        """All of them enter below the first layer."""
        return [0] * len(self.table)

    def states(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Rows of the table."""
        return self.table[numbers]


@dataclass(frozen=True)
class Insertion:
    """Virtual tokens that enter a pass before one layer. rows, anchors: (N,), rows of (B * N) nodes; numbers: (N,)."""

    tokens: VirtualTokens
    rows: Tensor
    numbers: Tensor
    anchors: Tensor

    def into(self, hidden: Tensor) -> Tensor:
        """The states (rows, D) or (B, N, D) before the layer, with those of the virtual tokens."""
        flat = hidden.flatten(0, -2)
        states = self.tokens.states(self.numbers, flat[self.anchors])
        return flat.index_copy(0, self.rows, states.to(hidden.dtype)).view(hidden.shape)


@contextmanager
def entering(layers: nn.ModuleList, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While it is open, the hidden states (B, N, D) before some of a transformers model's layers are changed."""

    def hook(change: Callable[[Tensor], Tensor], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handles = [
        layers[number].register_forward_pre_hook(partial(hook, change), with_kwargs=True)
        for number, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def insertions(
    tokens: VirtualTokens, entries: Sequence[tuple[int, int, int]], device: torch.device
) -> dict[int, Insertion]:
    """What enters a pass, by layer. entries: row, number and anchor of every virtual token."""
    by_layer: dict[int, list[tuple[int, int, int]]] = {}
    for entry in entries:
        by_layer.setdefault(tokens.layers[entry[1]], []).append(entry)
    return {
        layer: Insertion(tokens, *(torch.tensor(column).to(device) for column in zip(*of, strict=True)))
        for layer, of in by_layer.items()
    }
