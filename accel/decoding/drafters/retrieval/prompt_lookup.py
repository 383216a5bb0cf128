"""Prompt lookup: continue the sequence as its longest repeated suffix once went on.

Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
Departs from it: among equal matches the latest wins, not the first; positions are looked up in an index of n-grams.
"""

from dataclasses import dataclass, field

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError


@dataclass
class _Index:
    """ends: by n-gram, how many tokens stand before the place after its latest occurrence. known: tokens indexed."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 0


@dataclass(frozen=True)
class PromptLookup(Drafter):
    """Drafter without a model; max_ngram and min_ngram bound the suffix, in tokens, length the chain."""

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
        """What stood behind the latest occurrence of the longest suffix; nothing where no suffix repeats."""
        tokens = context.tokens
        index = context.state.setdefault(self, _Index())
        # The suffix itself is left out: an n-gram is indexed once a token stands behind it.
        for end in range(index.known, len(tokens)):
            for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
                index.ends[tuple(tokens[end - n : end])] = end
        index.known = len(tokens)
        for n in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            start = index.ends.get(tuple(tokens[-n:]))
            if start is not None:
                found = tokens[start : start + min(budget, self.length)]
                return DraftTree.chain(found, labels=[("prompt_lookup", n, depth) for depth in range(len(found))])
        return DraftTree()
