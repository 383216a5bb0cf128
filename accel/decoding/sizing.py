"""How many tokens to draft."""

from abc import ABC, abstractmethod

from accel.decoding.drafters.base import Outcome
from accel.decoding.tree import DraftTree


class Policy(ABC):
    """Decides before every pass how many tokens a drafter may propose, and which of them are worth a place in it.

    most: the largest tree that it ever asks for.
    """

    most: int

    @abstractmethod
    def budget(self, sequences: int) -> int:
        """Nodes that each of so many sequences may draft; 0 is none."""

    def select(self, tree: DraftTree, sequences: int) -> DraftTree:
        """The part of a tree that is verified. Only called where leaving nodes out biases nothing."""
        return tree

    def passed(self, nodes: int, seconds: float, draft_seconds: float) -> None:
        """The target took so long for a pass over so many nodes, and the drafter for its trees."""
        return

    def observe(self, outcome: Outcome) -> None:
        """A sequence was verified."""
        return


class Fixed(Policy):
    """Always the same number."""

    def __init__(self, nodes: int) -> None:
        self.most = nodes

    def budget(self, sequences: int) -> int:
        """That number."""
        return self.most
