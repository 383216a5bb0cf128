"""Speculative sampling: accept a draw x with probability min(1, p(x) / q(x)), else draw from norm(max(0, p - q)).

Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
Departs from it: a deterministic draft has a one-hot q, so its token is accepted with probability p(x).
"""

from dataclasses import dataclass

import torch

from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier
from hasten.accel.decoding.verifiers.rejection import Array, draft_distribution, recovered, walk


@dataclass(frozen=True)
class SpeculativeSampling(Verifier):
    """Verifier of chains: a draw is accepted with probability sum(min(p, q)), which no lossless rule exceeds."""

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Refuses trees, except at temperature 0."""
        if chains or greedy:
            return None
        better = "sample_and_match" if draft_sampling is DraftSampling.DETERMINISTIC else "recursive_rejection"
        return (
            "verifier=speculative_sampling takes chains only, and this drafter drafts trees, whose second children it "
            f"would accept too often: use verifier={better}"
        )

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The tokens before the first rejected one, and a recovered token; a bonus token if none is rejected."""

        def choose(node: int, target: Array, draws: list[int], points: list[float]) -> tuple[int | None, Array]:
            ((child,), (point,)) = draws, points
            draft = draft_distribution(tree, node, child, len(target))
            token = tree.tokens[child]
            if point * draft[token] < target[token]:
                return child, target
            return None, recovered(target, draft)

        return walk(tree, rows, generator, choose)
