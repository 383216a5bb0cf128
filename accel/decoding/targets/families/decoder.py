"""A decoder as the fast path runs it: operations and sizes, whatever family they were read from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# A linear layer, a norm or a feed-forward network: (rows, in) to (rows, out).
RowMap = Callable[[Tensor], Tensor]


class WeightedNorm(Protocol):
    """Root mean square norm over the last dimension, (rows, D) to (rows, D), with what a fused kernel needs of it."""

    @property
    def weight(self) -> Tensor:
        """Factors (D,)."""

    @property
    def eps(self) -> float:
        """Added to the mean square."""

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised rows."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer.

    qkv: the H * G query heads, then the H key heads, then the value heads, of D numbers each. Within a query or key
    head, the two numbers that are rotated together are adjacent. query_norm, key_norm: over the last dimension of
    heads (rows, heads, D). attention_norm, mlp_norm: before attention and feed-forward network; attention_out_norm and
    mlp_out_norm: of what they add to the hidden states. window: number of positions that attention reaches back, its
    own included; None for all. rotation: index of the layer's `Decoder.rotations`. None: the family has no such part.
    """

    attention_norm: RowMap
    qkv: RowMap
    out: RowMap
    mlp_norm: RowMap
    mlp: RowMap
    query_norm: WeightedNorm | None = None
    key_norm: WeightedNorm | None = None
    attention_out_norm: RowMap | None = None
    mlp_out_norm: RowMap | None = None
    window: int | None = None
    rotation: int = 0


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of the first R numbers of a head.

    frequencies: (R / 2,) radians per position. scale: factor of cosines and sines.
    """

    frequencies: Tensor
    scale: float

    def table(self, positions: int, size: int, device: torch.device) -> Tensor:
        """Cosines and sines (positions, size / 2, 2), float32, for heads of `size`; numbers beyond R do not turn.

        float32, because in bfloat16 a position times a frequency is wrong by whole rotations.
        """
        angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * self.frequencies.to(device)
        turned = torch.stack([angles.cos(), angles.sin()], -1) * self.scale
        still = torch.tensor([1.0, 0.0], device=device).expand(positions, size // 2 - turned.shape[1], 2)
        return torch.cat([turned, still], 1)


@dataclass(frozen=True)
class Decoder:
    """A model. embed: ids (N,) to rows (N, width); embedding: makes its weight (V, width), before any scale.

    heads: query heads. scale: of attention scores. score_cap, logit_cap: magnitudes c of soft caps c * tanh(x / c) of
    attention scores and of logits; None for none.
    data_dependent: whether the operations of a pass depend on values in it, so that it is not compiled.
    """

    layers: Sequence[Layer]
    embed: RowMap
    embedding: Callable[[], Tensor]
    norm: RowMap
    head: RowMap
    rotations: Sequence[Rotation]
    vocabulary: int
    max_length: int
    dtype: torch.dtype
    device: torch.device
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    score_cap: float | None = None
    logit_cap: float | None = None
    data_dependent: bool = False

    def first_layers(self, count: int) -> "Decoder":
        """The decoder of the first `count` layers, the final norm and the output layer."""
        return replace(self, layers=self.layers[:count])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (rows, V) of rows after the final norm."""
        logits = self.head(hidden)
        return logits if self.logit_cap is None else soft_cap(logits, self.logit_cap)


def soft_cap(values: Tensor, cap: float) -> Tensor:
    """cap * tanh(values / cap)."""
    return torch.tanh(values / cap) * cap
