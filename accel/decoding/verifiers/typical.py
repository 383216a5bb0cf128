"""Typical acceptance: accept tokens with p(x) > min(epsilon, delta exp(-H(p))); not lossless.

Source: Cai et al. 2024, arXiv:2401.10774 (Medusa); the rule after Hewitt et al. 2022, arXiv:2210.15191.
The longest path of accepted tokens wins, and among paths of equal length the most probable one, as in Medusa's code.
p is the target's distribution with the request's sampling parameters, and H its entropy. At temperature 0 it is greedy
verification, which is lossless; Medusa's code does the same.
Departs from it: the token after the path is drawn from the target; Medusa takes the most probable one.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.accel.decoding.sampling import draw
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier, descend
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Typical(Verifier):
    """Verifier with an entropy-dependent threshold; epsilon is its upper bound, delta scales it."""

    epsilon: float = 0.3
    delta: float = 0.09
    lossless: ClassVar[bool] = False
    reads_draft_probs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise UserError(f"{name}={value} is wrong: expected above 0 and at most 1")

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Refuses nothing: it is biased for every draft, which `lossless` declares."""
        return None

    def is_lossless(self, greedy: bool) -> bool:
        """At temperature 0 only, where it is greedy verification."""
        return greedy

    def threshold(self, probs: torch.Tensor) -> float:
        """Probability above which a token is accepted, for the target's distribution probs (V,)."""
        entropy = float(torch.special.entr(probs.double()).sum())
        return min(self.epsilon, self.delta * math.exp(-entropy))

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The longest path of typical tokens, and the target's own draw after it."""
        if rows.is_greedy:
            return descend(tree, rows.best)
        best, best_score = ROOT, (0, 0.0)
        waiting = [(ROOT, 0, 0.0)]
        while waiting:
            node, depth, likelihood = waiting.pop()
            if (depth, likelihood) > best_score:
                best, best_score = node, (depth, likelihood)
            if node not in tree.children:
                continue
            probs = rows.probs(node)
            threshold = self.threshold(probs)
            for child in tree.children[node]:
                chance = float(probs[tree.tokens[child]])
                if chance > threshold:
                    waiting.append((child, depth + 1, likelihood + math.log(chance)))
        return Verdict(tree.path(best), draw(rows.probs(best), generator))
