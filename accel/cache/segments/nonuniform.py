"""Segments of codes that stand for any values: centroids of normalised numbers, and outliers as they are.

Source: Hooper et al. 2024, arXiv:2401.18079 (KVQuant).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.cache.segments.pair import by_head
from hasten.kernels.packed_weight import pack_codes, unpack_codes

_ROUNDS = 25


@dataclass(frozen=True)
class Codes:
    """Vectors (T, C) as centroid[code] * scale + middle, with outliers in their place.

    words: int32 (T, words). centroids: (2**bits,). scale, middle: (1, C) or (T, 1). places: int32, indices of outliers
    into the flattened vectors, and values: theirs.
    """

    words: Tensor
    centroids: Tensor
    scale: Tensor
    middle: Tensor
    places: Tensor
    values: Tensor
    bits: int
    columns: int

    @classmethod
    def of(
        cls, vectors: Tensor, centroids: Tensor, scale: Tensor, middle: Tensor, outliers: Tensor, bits: int
    ) -> "Codes":
        """Of vectors (T, C). outliers: (T, C) bool."""
        normal = (vectors.float() - middle.float()) / scale.float()
        edges = (centroids[1:] + centroids[:-1]) / 2
        words = pack_codes(torch.bucketize(normal, edges.float()), bits)
        places = outliers.flatten().nonzero()[:, 0]
        return cls(
            words, centroids, scale, middle, places.int(), vectors.flatten()[places].clone(), bits, vectors.shape[1]
        )

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (self.words, self.centroids, self.scale, self.middle, self.places, self.values)

    def dense(self, heads: int) -> Tensor:
        """Vectors (H, T, D) in the dtype of the outliers."""
        codes = unpack_codes(self.words, self.bits, self.columns).long()
        whole = (self.centroids[codes] * self.scale.float() + self.middle.float()).to(self.values.dtype)
        whole.view(-1)[self.places.long()] = self.values
        return by_head(whole, heads)


def centroids_of(numbers: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Ascending centroids (2**bits,) float32 of numbers (N,), by k-means from their quantiles. weights: (N,)."""
    ordered, order = numbers.float().sort()
    count = 2**bits
    centres = ordered[((torch.arange(count, device=numbers.device) + 0.5) / count * len(ordered)).long()]
    # Sums of runs of the sorted numbers: a round is a search for the borders.
    shares = torch.ones_like(ordered) if weights is None else weights.float()[order]
    sizes, sums = (
        torch.cat([part.new_zeros(1), part.cumsum(0)]) for part in (shares.double(), (shares * ordered).double())
    )
    for _ in range(_ROUNDS):
        borders = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        borders = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(ordered))])
        weight = sizes[borders].diff()
        means = (sums[borders].diff() / weight).float()
        # A share that small is the rounding of the sums.
        centres = torch.where(weight > 1e-12 * sizes[-1], means, centres)
    return centres.sort().values
