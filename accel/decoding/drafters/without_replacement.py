"""Distinct tokens of a distribution, one at a time: drawn without replacement, or ranked by probability.

Draws have the distribution of Gumbel-top-k (Kool et al. 2019, arXiv:1903.06059), but take one random number for each
drawn token instead of one for each token of the vocabulary.
"""

from bisect import insort
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_MIN_REMAINING = 1e-9  # a smaller remaining probability may be a rounding error


class Candidate(NamedTuple):
    """A token. prob: its probability. remaining: probability of all tokens not drawn before it, its own included."""

    token: int
    prob: float
    remaining: float


def draw_distinct(probs: Tensor, generator: torch.Generator) -> Iterator[Candidate]:
    """Ids drawn from a distribution (V,) without replacement, until no probability remains.

    Ids are drawn lazily: an id that the caller does not request takes no random number. Whether another id follows
    depends on earlier draws only.
    """
    # float64: in float32 the sum over a large vocabulary is off by more than a rare token's share.
    cumulative = probs.double().cumsum(-1).cpu().numpy()
    total = float(cumulative[-1])
    # Start and size of each drawn token's interval of the cumulative distribution, which later draws skip.
    spans: list[tuple[float, float]] = []
    seen: set[int] = set()
    remaining = total
    while remaining > _MIN_REMAINING * total:
        point = remaining * float(torch.rand((), dtype=torch.float64, generator=generator))
        for start, size in spans:
            if point < start:
                break
            point += size
        token = int(cumulative.searchsorted(point, "right"))
        if token in seen or token == len(cumulative):  # rounding moved the point out of its interval
            continue
        start = float(cumulative[token - 1]) if token else 0.0
        size = float(cumulative[token]) - start
        yield Candidate(token, size / total, remaining / total)
        seen.add(token)
        insort(spans, (start, size))
        remaining -= size


def ranked(probs: Tensor, count: int) -> Iterator[Candidate]:
    """The `count` most probable ids of a distribution (V,), in descending order, without those of probability 0."""
    remaining = 1.0
    for prob, token in zip(*(top.tolist() for top in probs.topk(min(count, len(probs)))), strict=True):
        if prob == 0:
            return
        yield Candidate(token, prob, remaining)
        remaining -= prob
