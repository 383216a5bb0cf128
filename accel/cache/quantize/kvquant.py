"""KVQuant: codes for the centroids of normalised numbers, keys by channel before their rotation, outliers kept apart.

Source: Hooper et al. 2024, arXiv:2401.18079, and its code. Departs from it: ranges of the keys' channels and centroids
are those of the prompt, and not of other text before, and centroids are not weighted by gradients; Q-Norm is left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.quantize.unrotated import UnrotatedQuantizer
from hasten.accel.cache.segments.nonuniform import Codes, centroids_of
from hasten.accel.cache.segments.pair import UnrotatedPair
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS


@dataclass(frozen=True)
class KVQuant(UnrotatedQuantizer[Codes]):
    """Quantizer to centroids.

    bits: of a number. outliers: share of the numbers of a channel of keys, and of a token's values, that are kept as
    they are.
    """

    bits: int = 3
    outliers: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise UserError(f"cache.bits={self.bits} is none of {', '.join(map(str, BITS))}")
        if not 0 <= self.outliers < 0.5:
            raise UserError(f"cache.outliers={self.outliers} is out of range: 0 to less than 0.5")

    def quantize(self, keys: Tensor, values: Tensor, before: UnrotatedPair[Codes] | None) -> tuple[Codes, Codes]:
        """Codes by the ranges of the first tokens' channels, or by those of their own tokens."""
        rows = [part.transpose(0, 1).flatten(1) for part in (keys, values)]
        first = (None, None) if before is None else (before.keys, before.values)
        return self._keys(rows[0], first[0]), self._values(rows[1], first[1])

    def _keys(self, keys: Tensor, before: Codes | None) -> Codes:
        """Keys (T, C) by the ranges of the prompt's channels; what is outside them is an outlier."""
        if before is None:
            low, high = self._ends(keys, 0)
            scale, middle = _range(low, high, keys.dtype)
            inside = (keys >= low) & (keys <= high)
            centroids = centroids_of(((keys.float() - middle.float()) / scale.float())[inside], self.bits)
        else:
            scale, middle, centroids = before.scale, before.middle, before.centroids
        outside = (keys.float() - middle.float()).abs() > scale.float() * (1 + 1e-3)
        return Codes.of(keys, centroids, scale, middle, outside, self.bits)

    def _values(self, values: Tensor, before: Codes | None) -> Codes:
        """Values (T, C) by the ranges of their tokens."""
        low, high = self._ends(values, 1)
        scale, middle = _range(low, high, values.dtype)
        outside = (values < low) | (values > high)
        if before is None:
            normal = (values.float() - middle.float()) / scale.float()
            centroids = centroids_of(normal[~outside], self.bits)
        else:
            centroids = before.centroids
        return Codes.of(values, centroids, scale, middle, outside, self.bits)

    def _ends(self, vectors: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Least and largest numbers along dim that are no outliers."""
        size = vectors.shape[dim]
        ordered = vectors.float().sort(dim=dim).values
        cut = min(round(self.outliers / 2 * size), (size - 1) // 2)
        return ordered.narrow(dim, cut, 1), ordered.narrow(dim, size - 1 - cut, 1)


def _range(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Half of the range and its middle, by which numbers are brought to -1 … 1."""
    scale = ((high - low) / 2).clamp(min=torch.finfo(torch.float16).tiny)
    return scale.to(dtype), ((high + low) / 2).to(dtype)
