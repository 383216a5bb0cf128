"""RotateKV: keys without their rotary embedding, and values, are quantized in a Hadamard basis, token by token.

Source: Su et al. 2025, arXiv:2501.16383, and its code: channels of keys are sorted by their sums, so that heads share
outliers evenly, four heads are rotated together, and at 2 bits the grid covers 0.8 of the range. Its maximum code for
3 bits is wrong (2 ** 3 instead of 7), which is not repeated. Departs from it: the tokens with massive activations are
taken to be the first ones; without calibrated statistics, channels are sorted by the sums of the prompt's keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens
from hasten.accel.cache.quantize.unrotated import UnrotatedQuantizer
from hasten.accel.cache.segments.pair import UnrotatedPair
from hasten.accel.cache.segments.rotated import RotatedVectors
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS

_HEADS = 4


@dataclass(frozen=True)
class RotateKV(UnrotatedQuantizer[RotatedVectors], Calibrated):
    """Quantizer in a rotated basis.

    bits: of a number. group: numbers that share a grid. clip: share of the range that the grid covers; None is 0.8 at
    2 bits and else 1.
    """

    sinks: int = 4
    bits: int = 2
    group: int = 128
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise UserError(f"cache.bits={self.bits} is none of {', '.join(map(str, BITS))}")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise UserError(f"cache.clip={self.clip} is out of range: above 0, at most 1")
        if self.group < 1:
            raise UserError(f"cache.group={self.group} is out of range: 1 or more")

    def quantize(
        self,
        keys: Tensor,
        values: Tensor,
        before: UnrotatedPair[RotatedVectors] | None,
        statistics: Mapping[str, Tensor] | None,
    ) -> tuple[RotatedVectors, RotatedVectors]:
        """Codes in the rotated basis; the statistics, or the first tokens, choose the order of the keys' channels."""
        if statistics is not None:
            order: Tensor | None = statistics["order"]
        else:
            order = _order(keys.float().sum(1)) if before is None else before.keys.order
        clip = self.clip or (0.8 if self.bits == 2 else 1.0)
        return (
            RotatedVectors.of(keys, self.bits, self.group, clip, gcd(len(keys), _HEADS), order),
            RotatedVectors.of(values, self.bits, self.group, clip, 1, None),
        )

    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """Sums of the channels of keys without their rotation, (H, D)."""
        return {"sums": tokens.unrotated(tokens.keys).double().sum(1)}

    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """The order of the channels."""
        return [{"order": _order(own["sums"])} for own in layers]


def _order(sums: Tensor) -> Tensor:
    """Channels (H * D,) by their sums (H, D), those with the largest ones dealt out over groups of heads in turn."""
    ranked = sums.flatten().sort(descending=True, stable=True).indices
    groups = len(sums) // gcd(len(sums), _HEADS)
    return ranked.unflatten(0, (-1, groups)).T.flatten().int() if groups > 1 else torch.as_tensor(ranked).int()
