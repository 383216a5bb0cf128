"""CopySpec: if the last gamma tokens occurred before, copy what followed their first occurrence.

Source: Dumitru et al. 2025, arXiv:2502.08923.
Departs from it: n-grams are compared, not their hashes; a copy that reaches the end of the sequence continues through
itself; if nothing repeats, the draft is empty, and `FirstOf` provides the paper's fallback to a draft model.
"""

from dataclasses import dataclass

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Memory
from hasten.accel.decoding.drafters.retrieval.base import CopyingDrafter
from hasten.accel.decoding.drafters.retrieval.ngrams import NGramIndex, copied
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError

_MAX_MATCH = 32  # longer matches count as this long


@dataclass(frozen=True)
class CopySpec(CopyingDrafter):
    """Drafter without a model; gamma tokens must repeat, and at most `length` are copied."""

    gamma: int = 3
    length: int = 10

    def __post_init__(self) -> None:
        for name in ("gamma", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")

    def new_index(self) -> NGramIndex:
        """An empty index for one sequence."""
        return NGramIndex(self.gamma, self.gamma, latest=False)

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """The tokens after the first occurrence of the last gamma tokens; empty if these are new."""
        tokens, index = context.tokens, self.indexed(context)
        start = index.after(tuple(tokens[-self.gamma :]))
        if start is None:
            return DraftTree()
        draft = copied(tokens, start, min(budget, self.length))
        match = self.gamma
        while match < min(start, _MAX_MATCH) and tokens[start - match - 1] == tokens[-match - 1]:
            match += 1
        # Copies after longer matches are accepted more often, and what a copy takes from itself in loops only, so both
        # form classes of their own.
        own = len(tokens) - start
        labels = [("copy_spec", match.bit_length(), depth, depth >= own) for depth in range(len(draft))]
        return DraftTree.chain(draft, labels=labels)
