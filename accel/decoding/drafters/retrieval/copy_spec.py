"""CopySpec: if the last gamma tokens occurred before, copy what followed their first occurrence.

Source: Dumitru et al. 2025, arXiv:2502.08923.
Departs from it: n-grams are compared, not their hashes; if nothing repeats, the draft is empty, and `FirstOf` provides
the paper's fallback to a draft model.
"""

from dataclasses import dataclass, field

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError

_MAX_MATCH = 32  # longer matches count as this long


@dataclass
class _Index:
    """ends: for each n-gram the position after its first occurrence. known: number of indexed tokens."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 0


@dataclass(frozen=True)
class CopySpec(Drafter):
    """Drafter without a model; gamma tokens must repeat, and at most `length` are copied."""

    gamma: int = 3
    length: int = 10

    def __post_init__(self) -> None:
        for name in ("gamma", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")

    def chains(self) -> bool:
        """Every draft is a chain."""
        return True

    def propose(self, context: Context, memory: Memory, budget: int) -> DraftTree:
        """The tokens after the first occurrence of the last gamma tokens; empty if these are new."""
        tokens = context.tokens
        index = context.state.setdefault(self, _Index(known=self.gamma))
        # An n-gram is indexed once a token follows it, so the suffix does not match itself.
        for end in range(index.known, len(tokens)):
            index.ends.setdefault(tuple(tokens[end - self.gamma : end]), end)
        index.known = max(index.known, len(tokens))
        start = index.ends.get(tuple(tokens[-self.gamma :]))
        if start is None:
            return DraftTree()
        draft = tokens[start : start + min(budget, self.length)]
        match = self.gamma
        while match < min(start, _MAX_MATCH) and tokens[start - match - 1] == tokens[-match - 1]:
            match += 1
        # Copies after longer matches are accepted more often, so they form a class of their own.
        labels = [("copy_spec", match.bit_length(), depth) for depth in range(len(draft))]
        return DraftTree.chain(draft, labels=labels)
