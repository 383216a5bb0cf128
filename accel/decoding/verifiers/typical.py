"""Typical acceptance: keep what the target finds typical, p(x) > min(epsilon, delta exp(-H(p))); not lossless.

Source: Cai et al. 2024, arXiv:2401.10774 (Medusa); the rule after Hewitt et al. 2022, arXiv:2210.15191.
The longest acceptable path wins, among paths of a length the most probable one, as in Medusa's code. p and H are of the
distribution that the request asks for. At temperature 0, where Medusa's code goes by the most probable token and not by
this rule, it is greedy verification, which is lossless.
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
    """Verifier that accepts more the flatter the target is; epsilon is the most that it asks of a token."""

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
        """Nothing is refused: it is biased with every draft, and says so."""
        return None

    def threshold(self, probs: torch.Tensor) -> float:
        """What a token's probability must be above, where the target's distribution is probs (V,)."""
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
