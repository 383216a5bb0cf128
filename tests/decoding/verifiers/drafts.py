"""Drafts of every kind over five tokens, drawn many at a time, and how often a verifier makes which tokens of them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verifier

V = 5
# Row 0 is of the first token, row x + 1 of the token after x. Both have tokens that they never give.
TARGET = torch.tensor(
    [
        [0.35, 0.30, 0.20, 0.15, 0.00],
        [0.10, 0.40, 0.20, 0.25, 0.05],
        [0.60, 0.05, 0.05, 0.10, 0.20],
        [0.20, 0.20, 0.20, 0.20, 0.20],
        [0.05, 0.15, 0.50, 0.00, 0.30],
        [0.30, 0.10, 0.25, 0.05, 0.30],
    ]
)
DRAFT = torch.tensor(
    [
        [0.50, 0.10, 0.25, 0.00, 0.15],
        [0.30, 0.30, 0.10, 0.10, 0.20],
        [0.20, 0.20, 0.40, 0.15, 0.05],
        [0.45, 0.25, 0.10, 0.10, 0.10],
        [0.10, 0.10, 0.30, 0.30, 0.20],
        [0.20, 0.20, 0.20, 0.20, 0.20],
    ]
)


@dataclass(frozen=True)
class Kind:
    """How the two levels of a draft are made: so many children of the root, so many of each of them."""

    draft_sampling: DraftSampling
    first: int
    second: int

    @property
    def chains(self) -> bool:
        return self.first == self.second == 1

    def trees(self, count: int, seed: int = 0) -> Iterator[DraftTree]:
        """So many trees, all of them the same where nothing is drawn."""
        generator = torch.Generator().manual_seed(seed)
        tops = self._ids(DRAFT[:1].expand(count, -1), self.first, generator)
        below = [self._ids(DRAFT[token + 1 :][:1].expand(count, -1), self.second, generator) for token in range(V)]
        for index, top in enumerate(tops):
            yield self._tree(top, [each[index] for each in below])

    def _ids(self, probs: Tensor, count: int, generator: torch.Generator) -> list[list[int]]:
        if self.draft_sampling is DraftSampling.DETERMINISTIC:
            return probs.topk(count, -1).indices.tolist()
        # Without replacement the ids come in the order in which they were drawn.
        return torch.multinomial(
            probs, count, self.draft_sampling is DraftSampling.INDEPENDENT, generator=generator
        ).tolist()

    def _tree(self, top: list[int], below: list[list[int]]) -> DraftTree:
        tokens, parents, counts = [], [], []
        for parent, drawn in [(ROOT, top), *((node, below[token]) for node, token in enumerate(dict.fromkeys(top)))]:
            for token, count in Counter(drawn).items():
                tokens.append(token)
                parents.append(parent)
                counts.append(count)
        if self.draft_sampling is DraftSampling.DETERMINISTIC:
            return DraftTree(tokens, parents)
        probs = {parent: DRAFT[0 if parent == ROOT else tokens[parent] + 1] for parent in dict.fromkeys(parents)}
        return DraftTree(
            tokens,
            parents,
            self.draft_sampling,
            probs,
            counts if self.draft_sampling is DraftSampling.INDEPENDENT else None,
        )


KINDS = {
    "chain": Kind(DraftSampling.DETERMINISTIC, 1, 1),
    "tree": Kind(DraftSampling.DETERMINISTIC, 3, 2),
    "drawn chain": Kind(DraftSampling.INDEPENDENT, 1, 1),
    "independent": Kind(DraftSampling.INDEPENDENT, 4, 3),
    "without replacement": Kind(DraftSampling.WITHOUT_REPLACEMENT, 3, 2),
}


def rows(tree: DraftTree, sampling: Sampling) -> TargetRows:
    """What the target says to a tree."""
    return TargetRows(TARGET.log()[[0, *(token + 1 for token in tree.tokens)]], tree, Context([], 0, sampling))


def pairs(verifier: Verifier, trees: Iterator[DraftTree], sampling: Sampling, seed: int = 1) -> Tensor:
    """How often each pair of first and second token comes out, (V, V) float64."""
    generator = torch.Generator().manual_seed(seed)
    after = sampling.probs(TARGET.log())
    made, counts = torch.zeros(V, V, dtype=torch.float64), [0] * V
    for tree in trees:
        verdict = verifier.verify(tree, rows(tree, sampling), generator)
        tokens = [*(tree.tokens[node] for node in verdict.path), verdict.token]
        if len(tokens) == 1:
            counts[tokens[0]] += 1
        else:
            made[tokens[0], tokens[1]] += 1
    # Where one token came out the next pass gives the second: with none drafted it is the target's own.
    for token, count in enumerate(counts):
        if count:
            seconds = torch.multinomial(after[token + 1], count, True, generator=generator)
            made[token] += seconds.bincount(minlength=V)
    return made


def expected_pairs(sampling: Sampling) -> Tensor:
    """The target's own distribution of two tokens, (V, V)."""
    probs = sampling.probs(TARGET.log()).double()
    return probs[0][:, None] * probs[1:]


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of a chi-square test; 0 where something came out that never should."""
    possible = probs > 0
    if counts[~possible].any():
        return 0.0
    expected = counts.sum() * probs[possible] / probs.sum()
    assert expected.min() > 5, "the chi-square distribution holds for cells that are not all but empty"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc((possible.sum().double() - 1) / 2, statistic / 2))
