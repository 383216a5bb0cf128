"""Recursive rejection sampling: try the siblings in turn, each against what rejecting those before it left of p.

Source: Jeon et al. 2024, arXiv:2402.14160 (recursive speculative decoding); where draws are independent it is the rule
of Yang et al. 2024, arXiv:2401.06706 (multi-candidate speculative decoding).
Departs from it: takes siblings of every kind. Drawn without replacement, q loses every sibling that was rejected and is
renormalised; drawn independently, q stays, and a token that was drawn twice is tried twice; not drawn, q is one-hot.
"""

from dataclasses import dataclass

import torch

from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier
from hasten.accel.decoding.verifiers.rejection import Array, draft_distribution, recovered, walk


@dataclass(frozen=True)
class RecursiveRejection(Verifier):
    """Verifier of trees whose siblings stand in the order in which they were drawn."""

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Nothing is refused: how q changes from a sibling to the next follows from how they were drawn."""
        return None

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The accepted path, and a token recovered below its end; at a leaf a bonus token."""

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
    left = draft.copy()
    left[token] = 0
    total = left.sum()
    # Nothing is left where nothing else could be drawn; then nothing else was.
    return left / total if total > 0 else left
