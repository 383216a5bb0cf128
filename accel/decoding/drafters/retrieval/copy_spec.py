"""CopySpec: where the last gamma tokens stood before, copy what followed them the first time.

Source: Dumitru et al. 2025, arXiv:2502.08923.
Departs from it: whole n-grams are compared, not their hashes; where nothing repeats it proposes nothing, and what falls
back to a draft model there is `FirstOf`.
"""

from dataclasses import dataclass, field

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Memory
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError

_LONGEST = 32  # matches are told apart up to here


@dataclass
class _Index:
    """ends: by n-gram, how many tokens stand before the place after its first occurrence. known: tokens indexed."""

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
        """What stood behind the first occurrence of the last gamma tokens; nothing where they are new."""
        tokens = context.tokens
        index = context.state.setdefault(self, _Index(known=self.gamma))
        # The suffix itself is left out: an n-gram is indexed once a token stands behind it.
        for end in range(index.known, len(tokens)):
            index.ends.setdefault(tuple(tokens[end - self.gamma : end]), end)
        index.known = max(index.known, len(tokens))
        start = index.ends.get(tuple(tokens[-self.gamma :]))
        if start is None:
            return DraftTree()
        found = tokens[start : start + min(budget, self.length)]
        match = self.gamma
        while match < min(start, _LONGEST) and tokens[start - match - 1] == tokens[-match - 1]:
            match += 1
        # The longer the match, the surer the copy.
        labels = [("copy_spec", match.bit_length(), depth) for depth in range(len(found))]
        return DraftTree.chain(found, labels=labels)
