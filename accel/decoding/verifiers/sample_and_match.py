"""Sample and match: draw from the target once per node and descend if the draw is a drafted child.

Source: the rule of EAGLE-2 and of greedy tree verification (Miao et al. 2024, arXiv:2305.09781), in its general form.
Every output token is the target's own draw, so it is lossless for every tree, as long as drafts do not depend on the
verifier's random numbers. At temperature 0 it is greedy verification.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.accel.decoding.sampling import draw
from hasten.accel.decoding.tree import DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier, descend


@dataclass(frozen=True)
class SampleAndMatch(Verifier):
    """Verifier that takes one random number for each output token, whatever the draft."""

    reads_draft_probs: ClassVar[bool] = False

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Refuses nothing."""
        return None

    def is_independent_of_drafts(self, greedy: bool) -> bool:
        """Always: every token is the target's own draw."""
        return True

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The path of the target's own draws in the tree, and the first draw that is not in it."""
        if rows.is_greedy:
            return descend(tree, rows.best)
        return descend(tree, lambda node: draw(rows.probs(node), generator))
