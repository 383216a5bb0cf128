"""Prompt lookup: copy what followed the latest earlier occurrence of the sequence's longest repeated suffix.

Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
Departs from it: among equal matches it takes the latest, not the first; positions come from an index of n-grams; a copy
that reaches the end of the sequence continues through itself.
"""

from dataclasses import dataclass

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Memory
from hasten.accel.decoding.drafters.retrieval.base import CopyingDrafter
from hasten.accel.decoding.drafters.retrieval.ngrams import NGramIndex, copied
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class PromptLookup(CopyingDrafter):
    """Drafter without a model; max_ngram and min_ngram bound the suffix and length the chain, in tokens."""

    max_ngram: int = 3
    min_ngram: int = 1
    length: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise UserError(f"min_ngram={self.min_ngram} must be from 1 to max_ngram={self.max_ngram}")
        if self.length < 1:
            raise UserError(f"length={self.length} must be 1 or more")

    def new_index(self) -> NGramIndex:
        """An empty index for one sequence."""
        return NGramIndex(self.min_ngram, self.max_ngram, latest=True)

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """The tokens after the latest occurrence of the longest repeated suffix; empty if no suffix repeats."""
        tokens, index = context.tokens, self.indexed(context)
        for n in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            start = index.after(tuple(tokens[-n:]))
            if start is not None:
                draft = copied(tokens, start, min(budget, self.length))
                # What a copy takes from itself is accepted in loops only, so it forms a class of its own.
                own = len(tokens) - start
                return DraftTree.chain(
                    draft, labels=[("prompt_lookup", n, depth, depth >= own) for depth in range(len(draft))]
                )
        return DraftTree()
