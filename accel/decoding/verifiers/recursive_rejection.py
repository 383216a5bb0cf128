"""Recursive rejection sampling: try siblings in turn, each against the residual of p after the rejections before it.

Source: Jeon et al. 2024, arXiv:2402.14160 (recursive speculative decoding); where draws are independent it is the rule
of Yang et al. 2024, arXiv:2401.06706 (multi-candidate speculative decoding).
Departs from it: takes siblings of every kind. For draws without replacement, q loses each rejected sibling and is
renormalised. For independent draws q does not change, and a token that was drawn twice is tried twice. For
deterministic siblings q is one-hot.
"""

from dataclasses import dataclass

import torch

from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier
from hasten.accel.decoding.verifiers.rejection import Array, draft_distribution, recovered, walk


@dataclass(frozen=True)
class RecursiveRejection(Verifier):
    """Verifier of trees whose siblings are in the order in which they were drawn."""

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Refuses nothing: q is updated between siblings by the way in which they were drawn."""
        return None

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The accepted path, and the recovered token after it; at a leaf a bonus token."""

        def choose(node: int, target: Array, draws: list[int], points: list[float]) -> tuple[int | None, Array]:
            draft = draft_distribution(tree, node, draws[0], len(target))
            for index, (child, point) in enumerate(zip(draws, points, strict=True)):
                if index and tree.draft_sampling is DraftSampling.DETERMINISTIC:
                    draft = draft_distribution(tree, node, child, len(target))
                token = tree.tokens[child]
                if point * draft[token] < target[token]:
                    return child, target
                target = recovered(target, draft)
                if tree.draft_sampling is DraftSampling.WITHOUT_REPLACEMENT:
                    draft = _without(draft, token)
            return None, target

        return walk(tree, rows, generator, choose)


def _without(draft: Array, token: int) -> Array:
    rest = draft.copy()
    rest[token] = 0
    total = rest.sum()
    # The rest is zero if no other token could be drawn; then there is no further sibling either.
    return rest / total if total > 0 else rest
