"""Auto: each draft is verified by the lossless rule that accepts most drafts of its kind.

Sources: the rules are those of the other files of this folder; which of them accepts most is in docs/benchmarks.md.
Deterministic drafts: sample and match, which accepts a token with its target probability. Drafts that are drawn from q:
speculative sampling for chains, k-sequential selection for independent siblings, recursive rejection for siblings drawn
without replacement. These accept sum(min(p, q)) and more, where sample and match accepts only sum(p q).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hasten.accel.decoding.tree import DraftKind, DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, Verifier
from hasten.accel.decoding.verifiers.k_sequential import KSequential
from hasten.accel.decoding.verifiers.recursive_rejection import RecursiveRejection
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.accel.decoding.verifiers.speculative_sampling import SpeculativeSampling


@dataclass(frozen=True)
class Auto(Verifier):
    """Verifier that chooses the rule by how the tokens of a draft were chosen; at temperature 0 all rules are equal."""

    def refusal(self, draft_sampling: DraftSampling, chains: bool, greedy: bool) -> str | None:
        """Refuses nothing."""
        return None

    def verify(self, tree: DraftTree, rows: TargetRows, generator: torch.Generator) -> Verdict:
        """The verdict of the rule for the tree's kind.

        Independent draws without counts are one for every node, which makes them a chain. Whether draws merged into a
        chain does not count: a rule that is chosen by what was drawn would be biased.
        """
        return rule_for(DraftKind(tree.draft_sampling, tree.counts is None)).verify(tree, rows, generator)


def rule_for(kind: DraftKind) -> Verifier:
    """The rule that accepts most drafts of a kind."""
    if kind.draft_sampling is DraftSampling.DETERMINISTIC:
        return SampleAndMatch()
    if kind.draft_sampling is DraftSampling.WITHOUT_REPLACEMENT:
        return RecursiveRejection()
    return SpeculativeSampling() if kind.chains else KSequential()


def rules_for(kinds: Iterable[DraftKind]) -> list[Verifier]:
    """The rules that `Auto` applies to drafts of these kinds, each once."""
    return list(dict.fromkeys(map(rule_for, kinds)))
