"""K-sequential selection: keep the first of K independent draws that passes min(1, p(x) / (rho q(x))).

Source: Sun et al. 2023, arXiv:2310.15141 (SpecTr's k-SEQ, with the rho* that maximises acceptance).
In a tree, K counts the draws below a node: the drafts of SpecTr that agree with the accepted path. Repeated draws of a
token count one by one.
Departs from it: rho* is bisected only between two adjacent values of the sorted ratios p / q, where the acceptance has
a closed form, so that a step of the bisection costs no pass over the vocabulary.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier
from hasten.accel.decoding.verifiers.rejection import Array, draft_distribution, recovered, walk

_BISECTIONS = 30  # the upper end is returned: a rho above rho* is lossless, too, and accepts only slightly less
Number = TypeVar("Number", float, Array)


@dataclass(frozen=True)
class KSequential(Verifier):
    """Verifier of trees of independent draws; its acceptance is at least 1 - 1/e of that of the optimal rule."""

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Refuses siblings that are not independent draws, except at temperature 0."""
        if chains or greedy or draft_sampling is DraftSampling.INDEPENDENT:
            return None
        how, better = {
            DraftSampling.DETERMINISTIC: ("does not draw them", "sample_and_match"),
            DraftSampling.WITHOUT_REPLACEMENT: ("draws them without replacement", "recursive_rejection"),
        }[draft_sampling]
        return (
            f"verifier=k_sequential takes siblings that are independent draws, and this drafter {how}, so it would "
            f"accept them too often: use verifier={better}"
        )

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The accepted path, and the recovered token after it; at a leaf a bonus token."""

        def choose(node: int, target: Array, draws: list[int], points: list[float]) -> tuple[int | None, Array]:
            draft = draft_distribution(tree, node, draws[0], len(target))
            rho = least_rho(target, draft, len(draws))
            for child, point in zip(draws, points, strict=True):
                token = tree.tokens[child]
                if point * rho * draft[token] < target[token]:
                    return child, target
            return None, _recovered(target, draft, rho, len(draws))

        return walk(tree, rows, generator, choose)


def least_rho(target: Array, draft: Array, count: int) -> float:
    """rho*: the root in [1, K] of 1 - (1 - beta)^K = rho beta with beta = sum(min(q, p / rho)), K = count.

    target, draft: (V,). With a smaller rho, some tokens would be accepted with more than their target probability.
    """
    if count == 1:
        return 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = target / draft
    # Whether q or p / rho is the minimum depends on rho only for tokens with p / q between 1 and K.
    (between,) = np.nonzero((ratios > 1) & (ratios < count))
    between = between[ratios[between].argsort()]
    edges = ratios[between]
    inside = draft[ratios >= count].sum() + np.append(draft[between][::-1].cumsum()[::-1], 0.0)
    outside = target[ratios <= 1].sum() + np.append(0.0, target[between].cumsum())
    # rho* lies above the edges at which the left side of the equation is still larger.
    betas = inside[:-1] + outside[:-1] / edges
    place = int((_accepted(betas, count) > edges * betas).sum())
    low = float(edges[place - 1]) if place else 1.0
    high = float(edges[place]) if place < len(edges) else float(count)
    inner, outer = float(inside[place]), float(outside[place])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        beta = inner + outer / middle
        if 1 - (1 - beta) ** count > middle * beta:
            low = middle
        else:
            high = middle
    return high


def acceptance(target: Array, draft: Array, count: int) -> float:
    """Probability that one of K = count draws is accepted, 1 - (1 - beta)^K at rho*; target, draft: (V,)."""
    kept = np.minimum(draft, target / least_rho(target, draft, count))
    return float(_accepted(kept.sum(), count))


def _accepted(beta: Number, count: int) -> Number:
    return 1 - (1 - beta) ** count


def _recovered(target: Array, draft: Array, rho: float, count: int) -> Array:
    """Distribution (V,) of the token after all draws were rejected: p minus what accepted draws contribute to it."""
    kept = np.minimum(draft, target / rho)
    beta = kept.sum()
    # If p and q have no token in common, no draw is ever accepted.
    return recovered(target, kept * (_accepted(beta, count) / beta)) if beta > 0 else target
