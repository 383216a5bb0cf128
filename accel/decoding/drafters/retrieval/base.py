"""Base class of drafters that copy an earlier part of the sequence, which they find by its n-grams."""

from abc import abstractmethod
from collections.abc import Sequence

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory
from hasten.accel.decoding.drafters.retrieval.ngrams import NGramIndex


class CopyingDrafter(Drafter):
    """Drafter without a model, with an index of the n-grams of every sequence; its drafts are chains."""

    @abstractmethod
    def new_index(self) -> NGramIndex:
        """An empty index for one sequence."""

    def chains(self) -> bool:
        """Every draft is a chain."""
        return True

    def prefill(self, contexts: Sequence[Context], memory: Memory, budget: int) -> None:
        """Index the tokens of the sequences."""
        for context in contexts:
            self.indexed(context)

    def truncate(self, context: Context, length: int) -> None:
        """Roll the index back."""
        index: NGramIndex | None = context.state.get(self)
        if index is not None:
            index.truncate(length)

    def indexed(self, context: Context) -> NGramIndex:
        """The index of all tokens of a sequence."""
        index: NGramIndex | None = context.state.get(self)
        if index is None:
            index = context.state[self] = self.new_index()
        index.extend(context.tokens)
        return index
