"""Base class of cache methods that take statistics from calibration text, and not from every prompt anew.

A method says what it sums over calibration sequences, how sums are merged, and what it makes of them. The pass that
shows it the sequences is in calibration.py, the file of the statistics in statistics.py. Without statistics a method
takes what it needs from the prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Place
from hasten.accel.cache.segments.base import scores

# Tensors of a layer by name: sums, or the statistics that are made of them.
LayerTensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerTokens:
    """One calibration sequence in one layer.

    keys, values: (H, T, D), as a cache gets them. queries: (T, H * G, D). positions: (T,) int32. place: its `shared` is
    the method's own for the sequence, and goes from layer to layer. sequences: number of all calibration sequences, of
    T tokens each. key_gradients, value_gradients: (H, T, D), of the loss of the text by keys and values; None unless
    the method needs them, and then layers are shown from the last to the first.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    positions: Tensor
    place: Place
    sequences: int
    key_gradients: Tensor | None = None
    value_gradients: Tensor | None = None

    def unrotated(self, keys: Tensor) -> Tensor:
        """Keys (H, T, D), or their gradients, without the rotary embedding; of methods that need it."""
        assert self.place.rotary is not None
        return self.place.rotary(keys, self.positions.expand(len(keys), -1), True)


class Calibrated(ABC):
    """What a method with calibrated statistics has besides those of CacheMethod.

    calibrated_by: fields of the method that change its statistics. needs_gradients: whether it reads gradients.
    """

    calibrated_by: ClassVar[tuple[str, ...]] = ()
    needs_gradients: ClassVar[bool] = False

    @abstractmethod
    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """Sums of a sequence in a layer."""

    def merge(self, one: LayerTensors, other: LayerTensors) -> LayerTensors:
        """Sums of the sequences of both, in this order."""
        return {name: one[name] + other[name] for name in one}

    @abstractmethod
    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """Statistics of each layer, from the sums of all sequences in each."""


def attention(tokens: LayerTokens, first: int, last: int) -> Tensor:
    """Attention (H, G, W, T) float32 of the queries `first` to `last` of a sequence."""
    scoring, queries = tokens.place.scoring, tokens.queries[first:last]
    products = scores(queries, tokens.keys, scoring).unflatten(1, (-1, len(queries)))
    behind = tokens.positions[first:last, None] - tokens.positions
    hidden = behind < 0 if scoring.window is None else (behind < 0) | (behind >= scoring.window)
    return products.masked_fill_(hidden, -torch.inf).softmax(-1)


def settings(method: CacheMethod) -> Mapping[str, object]:
    """Fields of a method that change its statistics."""
    assert isinstance(method, Calibrated)
    return {name: getattr(method, name) for name in method.calibrated_by}
