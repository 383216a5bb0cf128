"""KVQuant: codes for the centroids of normalised numbers, keys by channel before their rotation, outliers kept apart.

Source: Hooper et al. 2024, arXiv:2401.18079, and its code: ranges of the keys' channels are calibrated, and so are the
centroids, by k-means in which a number counts by the square of the loss's gradient (the diagonal of the Fisher matrix).
Departs from it: centroids are found on evenly spaced tokens of the calibration text; Q-Norm is left out. Without
calibrated statistics, ranges and centroids are those of the prompt, without weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.accel.cache.calibrated import Calibrated, LayerTensors, LayerTokens
from hasten.accel.cache.quantize.unrotated import UnrotatedQuantizer
from hasten.accel.cache.segments.nonuniform import Codes, centroids_of
from hasten.accel.cache.segments.pair import UnrotatedPair
from hasten.accel.errors import UserError
from hasten.kernels.packed_weight import BITS

# Tokens of all calibration sequences whose numbers, with their weights, find a layer's centroids.
_SAMPLES = 1024


@dataclass(frozen=True)
class KVQuant(UnrotatedQuantizer[Codes], Calibrated):
    """Quantizer to centroids.

    bits: of a number. outliers: share of the numbers of a channel of keys, and of a token's values, that are kept as
    they are.
    """

    bits: int = 3
    outliers: float = 0.01

    calibrated_by: ClassVar[tuple[str, ...]] = ("sinks", "bits", "outliers")
    needs_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise UserError(f"cache.bits={self.bits} is none of {', '.join(map(str, BITS))}")
        if not 0 <= self.outliers < 0.5:
            raise UserError(f"cache.outliers={self.outliers} is out of range: 0 to less than 0.5")

    def quantize(
        self,
        keys: Tensor,
        values: Tensor,
        before: UnrotatedPair[Codes] | None,
        statistics: Mapping[str, Tensor] | None,
    ) -> tuple[Codes, Codes]:
        """Codes by calibrated ranges of channels, or those of the first tokens' channels; values by their tokens'."""
        rows = [part.transpose(0, 1).flatten(1) for part in (keys, values)]
        first = (None, None) if before is None else (before.keys, before.values)
        return self._keys(rows[0], first[0], statistics), self._values(rows[1], first[1], statistics)

    def _keys(self, keys: Tensor, before: Codes | None, statistics: Mapping[str, Tensor] | None) -> Codes:
        """Keys (T, C) by the ranges of channels; what is outside them is an outlier."""
        if statistics is not None:
            scale, middle, centroids = (statistics[name] for name in ("scale", "middle", "key_centroids"))
        elif before is None:
            low, high = self._ends(keys, 0)
            scale, middle = _range(low, high, keys.dtype)
            inside = (keys >= low) & (keys <= high)
            centroids = centroids_of(((keys.float() - middle.float()) / scale.float())[inside], self.bits)
        else:
            scale, middle, centroids = before.scale, before.middle, before.centroids
        outside = (keys.float() - middle.float()).abs() > scale.float() * (1 + 1e-3)
        return Codes.of(keys, centroids, scale, middle, outside, self.bits)

    def _values(self, values: Tensor, before: Codes | None, statistics: Mapping[str, Tensor] | None) -> Codes:
        """Values (T, C) by the ranges of their tokens."""
        scale, middle, outside = self._token_ranges(values)
        if statistics is not None:
            centroids = statistics["value_centroids"]
        elif before is None:
            normal = (values.float() - middle.float()) / scale.float()
            centroids = centroids_of(normal[~outside], self.bits)
        else:
            centroids = before.centroids
        return Codes.of(values, centroids, scale, middle, outside, self.bits)

    def observe(self, tokens: LayerTokens) -> LayerTensors:
        """The ends of the keys' channels, and numbers of some tokens with their weights."""
        assert tokens.key_gradients is not None
        assert tokens.value_gradients is not None
        given = (tokens.unrotated(tokens.keys), tokens.values)
        slopes = (tokens.unrotated(tokens.key_gradients), tokens.value_gradients)
        keys, values, key_slopes, value_slopes = (
            part[:, self.sinks :].transpose(0, 1).flatten(1).float() for part in (*given, *slopes)
        )
        count = len(keys)
        ordered = keys.sort(dim=0).values
        # So many of the least and of the largest numbers that the ends of all sequences are among them.
        kept = self._cut(count * tokens.sequences) + 1
        chosen = torch.linspace(0, count - 1, max(1, min(count, _SAMPLES // tokens.sequences))).long()
        scale, middle, outside = self._token_ranges(values[chosen])
        normal = (values[chosen] - middle) / scale
        return {
            "least": ordered[:kept],
            "largest": ordered[-kept:],
            "kept": torch.tensor(kept),
            "count": torch.tensor(count),
            "keys": keys[chosen],
            "key_weights": key_slopes[chosen].square(),
            "values": normal[~outside],
            "value_weights": value_slopes[chosen][~outside].square(),
        }

    def merge(self, one: LayerTensors, other: LayerTensors) -> LayerTensors:
        """Numbers of both, of which the least and the largest may be ends of all sequences."""
        kept = int(one["kept"])
        names = [name for name in one if name not in ("kept", "count")]
        both = {name: torch.cat([one[name], other[name]]) for name in names}
        both["least"] = both["least"].sort(dim=0).values[:kept]
        both["largest"] = both["largest"].sort(dim=0).values[-kept:]
        return both | {"kept": one["kept"], "count": one["count"] + other["count"]}

    def solve(self, layers: Sequence[LayerTensors]) -> list[LayerTensors]:
        """Ranges of the channels of keys, and centroids of keys and values."""
        return [self._solve(own) for own in layers]

    def _solve(self, sums: LayerTensors) -> LayerTensors:
        cut = self._cut(int(sums["count"]))
        low, high = sums["least"][cut], sums["largest"][-1 - cut]
        scale, middle = _range(low[None], high[None], torch.float32)
        keys = sums["keys"]
        inside = (keys >= low) & (keys <= high)
        normal = ((keys - middle) / scale)[inside]
        return {
            "scale": scale,
            "middle": middle,
            "key_centroids": centroids_of(normal, self.bits, sums["key_weights"][inside]),
            "value_centroids": centroids_of(sums["values"], self.bits, sums["value_weights"]),
        }

    def _token_ranges(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and middle (T, 1) of values (T, C), and which of them are outliers."""
        low, high = self._ends(values, 1)
        return *_range(low, high, values.dtype), (values < low) | (values > high)

    def _cut(self, size: int) -> int:
        """Outliers at each end of so many numbers."""
        return min(round(self.outliers / 2 * size), (size - 1) // 2)

    def _ends(self, vectors: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Least and largest numbers along dim that are no outliers."""
        size = vectors.shape[dim]
        ordered = vectors.float().sort(dim=dim).values
        cut = self._cut(size)
        return ordered.narrow(dim, cut, 1), ordered.narrow(dim, size - 1 - cut, 1)


def _range(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Half of the range and its middle, by which numbers are brought to -1 … 1."""
    scale = ((high - low) / 2).clamp(min=torch.finfo(torch.float16).tiny)
    return scale.to(dtype), ((high + low) / 2).to(dtype)
