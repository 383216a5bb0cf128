"""Prompt lookup: copy what followed the latest earlier occurrence of the sequence's longest repeated suffix.

Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
Departs from it: among equal matches it takes the latest, not the first; positions come from an index of n-grams.
"""

from dataclasses import dataclass, field

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError


@dataclass
class _Index:
    """ends: for each n-gram the position after its latest occurrence. known: number of indexed tokens."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 0


@dataclass(frozen=True)
class PromptLookup(Drafter):
    """Drafter without a model; max_ngram and min_ngram bound the suffix and length the chain, in tokens."""

    max_ngram: int = 3
    min_ngram: int = 1
    length: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise UserError(f"min_ngram={self.min_ngram} must be from 1 to max_ngram={self.max_ngram}")
        if self.length < 1:
            raise UserError(f"length={self.length} must be 1 or more")

    def chains(self) -> bool:
        """Every draft is a chain."""
        return True

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """The tokens after the latest occurrence of the longest repeated suffix; empty if no suffix repeats."""
        tokens = context.tokens
        index = context.state.setdefault(self, _Index())
        # An n-gram is indexed once a token follows it, so the suffix does not match itself.
        for end in range(index.known, len(tokens)):
            for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
                index.ends[tuple(tokens[end - n : end])] = end
        index.known = len(tokens)
        for n in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            start = index.ends.get(tuple(tokens[-n:]))
            if start is not None:
                draft = tokens[start : start + min(budget, self.length)]
                return DraftTree.chain(draft, labels=[("prompt_lookup", n, depth) for depth in range(len(draft))])
        return DraftTree()
