"""Lexical units: accept what the drafter is sure of, whatever the target says; not lossless at any temperature.

Source: Sun et al. 2024, arXiv:2405.15208 (LUD), whose fine-tuned model accepts tokens that it predicts in parallel, up
to the first one with a confidence below a threshold, and at least the next token. Full text and code were not
available: the default threshold is ours. A head that was trained for 128 CPU seconds on the embedded target was never
that sure, so its output was the target's own.
Departs from it: a pass here computes the target's distribution after every node, too. So below the threshold drafts are
verified as usual, by drawing the target's own token, where LUD ends the unit; and no pass is saved by not looking, only
more tokens are accepted. Its control of repetitions is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.accel.decoding.sampling import draw
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier, descend
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class LexicalUnit(Verifier):
    """Verifier that accepts drafts with a confidence above a threshold: the output is not the target's own.

    Drafts without confidences, such as those of drafters without probabilities, are verified by sample and match.
    confidence: the drafter's probability of a token, given those before it, above which it is accepted unverified.
    """

    confidence: float = 0.9
    lossless: ClassVar[bool] = False
    reads_draft_probs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UserError(f"confidence={self.confidence} is wrong: expected above 0 and below 1")

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Refuses nothing: it is biased for every draft with confidences, which `lossless` declares."""
        return None

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """Confident children, of siblings the most confident one; where there is none, the target's own token."""

        def choose(node: int) -> int:
            if tree.confidences is not None:
                best = max(tree.children.get(node, ()), key=tree.confidences.__getitem__, default=None)
                if best is not None and tree.confidences[best] > self.confidence:
                    return tree.tokens[best]
            return rows.best(node) if rows.is_greedy else draw(rows.probs(node), generator)

        return descend(tree, choose)
