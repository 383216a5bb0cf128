"""K-sequential selection: keep the first of K independent draws that passes min(1, p(x) / (rho q(x))).

Source: Sun et al. 2023, arXiv:2310.15141 (SpecTr's k-SEQ, with the rho* at which the most is accepted).
Where several tokens are drafted, those draws count below a node that went on from it: the K of SpecTr's drafts that
agree with what was accepted so far, each repeated draw by itself.
Departs from it: rho* is bisected between two neighbours of the sorted ratios p / q only, where the acceptance has a
closed form; a step of the bisection costs no pass over the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier
from hasten.accel.decoding.verifiers.rejection import Array, draft_distribution, recovered, walk

_BISECTIONS = 30  # a rho above rho* is lossless, too, and accepts less by no more than it is above


@dataclass(frozen=True)
class KSequential(Verifier):
    """Verifier of trees of independent draws; accepts at least 1 - 1/e of what the best rule would."""

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Siblings that depend on each other are refused, but where there is nothing to draw."""
        if chains or greedy or draft_sampling is DraftSampling.INDEPENDENT:
            return None
        how, better = {
            DraftSampling.DETERMINISTIC: ("does not draw them", "sample_and_match"),
            DraftSampling.WITHOUT_REPLACEMENT: ("draws them without replacement", "recursive_rejection"),
        }[draft_sampling]
        return (
            f"verifier=k_sequential takes siblings for independent draws, and this drafter {how}, which it would keep "
            f"too often: use verifier={better}"
        )

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The accepted path, and a token recovered below its end; at a leaf a bonus token."""

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

    target, draft: (V,). Below it more would be kept of some tokens than the target has of them.
    """
    if count == 1:
        return 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = target / draft
    # Of which tokens q or p / rho is the smaller depends on rho only where p / q is between 1 and K.
    (between,) = np.nonzero((ratios > 1) & (ratios < count))
    between = between[ratios[between].argsort()]
    edges = ratios[between]
    inside = draft[ratios >= count].sum() + np.append(draft[between][::-1].cumsum()[::-1], 0.0)
    outside = target[ratios <= 1].sum() + np.append(0.0, target[between].cumsum())
    # rho* lies behind those edges at which the left side is still the larger one.
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
    """Probability that one of K = count draws is kept, 1 - (1 - beta)^K at rho*; target, draft: (V,)."""
    kept = np.minimum(draft, target / least_rho(target, draft, count))
    return float(_accepted(kept.sum(), count))


def _accepted(beta: Any, count: int) -> Any:
    return 1 - (1 - beta) ** count


def _recovered(target: Array, draft: Array, rho: float, count: int) -> Array:
    """Distribution (V,) of the token after all draws were rejected: p without what they would have given of it."""
    kept = np.minimum(draft, target / rho)
    beta = kept.sum()
    # Without common tokens nothing is ever kept.
    return recovered(target, kept * (_accepted(beta, count) / beta)) if beta > 0 else target
