"""A target that is divided over several processes: each runs its part, and one leads.

The engine runs in the leading process only. Its calls are repeated by all others, in the same order and with the same
arguments, because a pass over a divided model is a collective operation. A call that computes nothing waits for the
next pass, and is sent with it: one message a pass.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.accel.decoding.targets.base import PREFILL_CHUNK, Pass
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.targets.virtual import VirtualTokens

# A method's name and its arguments.
Call = tuple[str, tuple[Any, ...]]


class DividedTarget(TransformersTarget):
    """The part of one process. whole: context in which a parameter is complete; entered by all processes at once."""

    def __init__(
        self, model: PreTrainedModel, whole: Callable[[Tensor], AbstractContextManager[Any]] | None = None
    ) -> None:
        super().__init__(model)
        self._whole = whole or (lambda parameter: nullcontext())

    def embedding(self) -> Tensor:
        """A copy of the whole weight of the token embedding."""
        weight = self._model.get_input_embeddings().weight
        with torch.no_grad(), self._whole(weight):
            return weight.detach().clone()

    def repeat(self, calls: Sequence[Call]) -> None:
        """Repeat calls of the leading process."""
        for name, arguments in calls:
            if name == "feature_layers":
                (self.feature_layers,) = arguments
            elif name == "virtual":
                (self.virtual,) = arguments
            elif name == "token_bytes":
                _ = self.token_bytes
            else:
                getattr(self, name)(*arguments)


class LeadingTarget(DividedTarget):
    """The part of the process in which the engine runs. send: sends calls to all others, which repeat them."""

    def __init__(
        self,
        model: PreTrainedModel,
        send: Callable[[Sequence[Call]], None],
        whole: Callable[[Tensor], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._send, self._unsent = send, list[Call]()
        self._layers_of_features: tuple[int, ...] = ()
        self._virtual: VirtualTokens | None = None
        super().__init__(model, whole)
        self.waits_for_others = True

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """See Target."""
        return self._layers_of_features

    @feature_layers.setter
    def feature_layers(self, layers: tuple[int, ...]) -> None:
        if layers != self._layers_of_features:
            self._later("feature_layers", layers)
            self._layers_of_features = layers

    @property
    def virtual(self) -> VirtualTokens | None:
        """See Target."""
        return self._virtual

    @virtual.setter
    def virtual(self, tokens: VirtualTokens | None) -> None:
        if tokens is not self._virtual:
            self._later("virtual", tokens)
            self._virtual = tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in this process; counted in a pass."""
        if self._token_bytes is None:
            self._now("token_bytes")
        return super().token_bytes

    def reserve(self, slots: int, capacity: int) -> None:
        """See Target."""
        self._later("reserve", slots, capacity)
        super().reserve(slots, capacity)

    def clear(self, slot: int) -> None:
        """See Target."""
        self._later("clear", slot)
        super().clear(slot)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        """See Target."""
        self._later("commit", slot, list(path))
        super().commit(slot, path)

    def swap(self, one: int, other: int) -> None:
        """See Target."""
        self._later("swap", one, other)
        super().swap(one, other)

    def cut(self, slot: int, length: int) -> None:
        """See Target."""
        self._later("cut", slot, length)
        super().cut(slot, length)

    def embedding(self) -> Tensor:
        """See DividedTarget."""
        self._now("embedding")
        return super().embedding()

    def prefill(self, slot: int, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> Tensor | None:
        """See Target."""
        self._now("prefill", slot, list(tokens), chunk)
        return super().prefill(slot, tokens, chunk)

    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> Pass:
        """See Target."""
        self._now("forward", list(slots), [list(new) for new in tokens], [list(above) for above in parents])
        return super().forward(slots, tokens, parents)

    def _later(self, name: str, *arguments: object) -> None:
        self._unsent.append((name, arguments))

    def _now(self, name: str, *arguments: object) -> None:
        calls, self._unsent = [*self._unsent, (name, arguments)], []
        self._send(calls)
