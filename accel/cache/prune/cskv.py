"""CSKV: older keys and values are kept in fewer channels, as what a layer's low-rank projections give.

Source: Wang et al. 2024, arXiv:2409.10593, and its code: W_k and W_v become products A B, trained on the mean squared
error of a layer's keys and values; the cache holds x A of all tokens, and the last tokens as they are, too.
Departs from it: a cache sees keys and values, and not x. The A B of least mean squared error over all matrices of one
rank is W V V^T, where V are the first eigenvectors of the second moment of the keys (values), and then x A is K V. So V
is what is calibrated, in closed form in place of training from an initial decomposition, and no model is changed. Keys
are those without their rotary embedding, which is added when they are read. Codes of few bits are rounded, without
training for it. Without calibrated statistics V is that of the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens
from hasten.accel.cache.quantize.unrotated import UnrotatedQuantizer
from hasten.accel.cache.segments.pair import UnrotatedPair
from hasten.accel.cache.segments.projected import Projected
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS


@dataclass(frozen=True)
class CSKV(UnrotatedQuantizer[Projected], Calibrated):
    """Low rank in each layer.

    key_rank, value_rank: channels that are kept, as shares of a layer's. bits: of a kept number, keys in groups of
    `block` tokens of a channel, values in groups of a token's channels; None keeps them as they are.
    """

    sinks: int = 0
    key_rank: float = 0.5
    value_rank: float = 0.5
    bits: int | None = None

    calibrated_by: ClassVar[tuple[str, ...]] = ("key_rank", "value_rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_rank", "value_rank"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"cache.{name}={getattr(self, name)} is out of range: above 0, at most 1")
        if self.bits is not None and self.bits not in BITS:
            raise UserError(f"cache.bits={self.bits} is none of {', '.join(map(str, BITS))}, and not null")

    def quantize(
        self,
        keys: Tensor,
        values: Tensor,
        before: UnrotatedPair[Projected] | None,
        statistics: Mapping[str, Tensor] | None,
    ) -> tuple[Projected, Projected]:
        """Codes in the calibrated bases, or in those of the first tokens."""
        rows = [part.transpose(0, 1).flatten(1) for part in (keys, values)]
        if statistics is not None:
            bases = statistics["keys"], statistics["values"]
        elif before is not None:
            bases = before.keys.basis, before.values.basis
        else:
            key_basis, value_basis = (_basis(part.float().T @ part.float(), rank) for part, rank in self._ranks(rows))
            bases = key_basis.to(keys.dtype), value_basis.to(values.dtype)
        return (
            Projected.of(rows[0], bases[0], self.bits, "channel", self.block),
            Projected.of(rows[1], bases[1], self.bits, "token", None),
        )

    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """Second moments of keys and values, (H * D, H * D) each."""
        rows = (part.transpose(0, 1).flatten(1).double() for part in (tokens.unrotated(tokens.keys), tokens.values))
        return {name: part.T @ part for name, part in zip(("keys", "values"), rows, strict=True)}

    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """The bases."""
        bases = []
        for own in layers:
            keys, values = (_basis(moment, rank) for moment, rank in self._ranks([own["keys"], own["values"]]))
            bases.append({"keys": keys, "values": values})
        return bases

    def _ranks(self, parts: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Matrices of keys and of values, each with the channels that are kept of its columns."""
        shares = (self.key_rank, self.value_rank)
        return [(part, max(1, round(share * part.shape[1]))) for part, share in zip(parts, shares, strict=True)]


def _basis(moment: Tensor, rank: int) -> Tensor:
    """The first eigenvectors (R, C) of a matrix (C, C)."""
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank].T.float().contiguous()
