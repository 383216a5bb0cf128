"""Tokens of a distribution one after the other, each once: drawn in order, or by rank.

What is drawn in order has the distribution of Gumbel-top-k (Kool et al. 2019, arXiv:1903.06059), at one random number
for each token that is taken and not for each of the vocabulary.
"""

from bisect import insort
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_NOTHING = 1e-9  # less than that may be the rounding of what is left of a distribution


class Candidate(NamedTuple):
    """A token, its share of the distribution, and the share that the tokens before it left, itself included."""

    token: int
    share: float
    left: float


def drawn(probs: Tensor, generator: torch.Generator) -> Iterator[Candidate]:
    """Ids drawn from a distribution (V,) without replacement, until it has no more.

    Whether an id comes is settled before it is drawn; one that the caller does not ask for takes no random number.
    """
    # float64: in float32 the sum over a large vocabulary is off by more than a rare token's share.
    cumulative = probs.double().cumsum(-1).cpu().numpy()
    total = float(cumulative[-1])
    spans: list[tuple[float, float]] = []  # where what was taken starts, and how long it is
    seen: set[int] = set()
    left = total
    while left > _NOTHING * total:
        point = left * float(torch.rand((), dtype=torch.float64, generator=generator))
        for start, size in spans:
            if point < start:
                break
            point += size
        token = int(cumulative.searchsorted(point, "right"))
        if token in seen or token == len(cumulative):  # a point was rounded over an edge
            continue
        start = float(cumulative[token - 1]) if token else 0.0
        size = float(cumulative[token]) - start
        yield Candidate(token, size / total, left / total)
        seen.add(token)
        insort(spans, (start, size))
        left -= size


def ranked(probs: Tensor, count: int) -> Iterator[Candidate]:
    """The `count` most probable ids of a distribution (V,), as far as their probability is not 0."""
    left = 1.0
    for share, token in zip(*(each.tolist() for each in probs.topk(min(count, len(probs)))), strict=True):
        if share == 0:
            return
        yield Candidate(token, share, left)
        left -= share
