"""RotateKV: keys without their rotary embedding, and values, are quantized in a Hadamard basis, token by token.

Source: Su et al. 2025, arXiv:2501.16383, and its code: channels of keys are sorted by their sums, so that heads share
outliers evenly, four heads are rotated together, and at 2 bits the grid covers 0.8 of the range. Its maximum code for
3 bits is wrong (2 ** 3 instead of 7), which is not repeated. Departs from it: channels are sorted by the prompt's own
sums, and the tokens with massive activations are taken to be the first ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.base import CacheMethod, Kept, Place, Recent
from hasten.accel.cache.segments.base import Segment
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.rotated import Rotated, RotatedVectors
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS

_HEADS = 4


@dataclass(frozen=True)
class RotateKV(CacheMethod):
    """Quantizer in a rotated basis.

    bits: of a number. group: numbers that share a grid. clip: share of the range that the grid covers; None is 0.8 at
    2 bits and else 1. sinks: first tokens that stay as they are. residual: last ones. block: tokens packed at a time.
    """

    bits: int = 2
    group: int = 128
    clip: float | None = None
    sinks: int = 4
    residual: int = 32
    block: int = 32

    has_budget: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"cache.bits={self.bits} is none of {', '.join(map(str, BITS))}")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise UserError(f"cache.clip={self.clip} is out of range: above 0, at most 1")
        if min(self.sinks, self.residual) < 0 or min(self.group, self.block) < 1:
            raise UserError(
                "need cache.sinks >= 0, cache.residual >= 0, cache.group >= 1 and cache.block >= 1, got "
                f"{self.sinks}, {self.residual}, {self.group} and {self.block}"
            )

    def compress(self, segments: Sequence[Segment], recent: Recent, place: Place) -> Kept | None:
        """Whole blocks of the oldest dense tokens are packed behind the sinks; no token is packed twice."""
        heads, count = recent.keys.shape[:2]
        sinks = 0 if segments else min(self.sinks, count)
        packed = (count - self.residual - sinks) // self.block * self.block
        if packed < self.block:
            return None
        assert place.rotary is not None
        made, order = list(segments), None
        positions = recent.positions.expand(heads, -1)
        if sinks:
            first = (part[:, :sinks].clone() for part in (recent.keys, recent.values, positions))
            made.append(Dense(*first))
        own = slice(sinks, sinks + packed)
        keys = place.rotary(recent.keys[:, own], positions[:, own], True)
        before = next((segment for segment in segments if isinstance(segment, Rotated)), None)
        order = _order(keys) if before is None else before.keys.order
        clip = self.clip or (0.8 if self.bits == 2 else 1.0)
        joined = gcd(heads, _HEADS)
        made.append(
            Rotated(
                RotatedVectors.of(keys, self.bits, self.group, clip, joined, order),
                RotatedVectors.of(recent.values[:, own], self.bits, self.group, clip, 1, None),
                recent.positions[own].clone().expand(heads, -1),
                place.rotary,
            )
        )
        return Kept(made, count - sinks - packed)


def _order(keys: Tensor) -> Tensor:
    """Channels (H * D,) of keys (H, T, D), those with the largest sums dealt out over groups of heads in turn."""
    sums = keys.float().sum(1).flatten()
    ranked = sums.sort(descending=True, stable=True).indices
    groups = len(keys) // gcd(len(keys), _HEADS)
    return ranked.unflatten(0, (-1, groups)).T.flatten().int() if groups > 1 else torch.as_tensor(ranked).int()
