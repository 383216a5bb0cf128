"""The interface of draft lengths: a draft length sets the drafter's budget before a pass, and learns from the outcome.

A `DraftLength` is a frozen dataclass of hyper-parameters. It starts a `LengthController` for each decoding process,
which holds what is learned.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import DraftTree


class LengthController(ABC):
    """Decides before every pass how many tokens a drafter may propose, and which of them are verified.

    max_nodes: the largest budget that it ever returns.
    """

    max_nodes: int

    def observes_prompt(self, sequences: int) -> bool:
        """Whether a drafter that would observe a new prompt is to do so; sequences: number decoded at once."""
        return self.max_nodes > 0

    def begin_sequence(self) -> None:
        """Called when a sequence begins, whose text may be of another kind."""
        return

    @abstractmethod
    def budget(self, sequences: int) -> int:
        """Tokens to draft for each of the `sequences` sequences of the next pass; 0 drafts none."""

    def probes(self) -> bool:
        """Whether the pass that `budget` was called for drafts for one sequence only, to learn what that is worth."""
        return False

    def learns(self) -> bool:
        """Whether drafters that observe the target learn from the pass that `budget` was called for."""
        return True

    def count_virtual(self, max_virtual_nodes: Callable[[int], int]) -> None:
        """Called once before all else. max_virtual_nodes: how many of a budget's nodes are virtual, and no tokens."""
        return

    def limit(self, nodes: int) -> None:
        """Called after `budget` if only `nodes` tokens are drafted, because the sequences need no more."""
        return

    def select(self, trees: Sequence[DraftTree], sequences: int, whole: Sequence[bool]) -> list[DraftTree]:
        """The part of each draft of a pass over `sequences` sequences that is verified.

        trees: of all sequences that can be drafted for; of one while `probes` is true.
        whole: drafts of which no node may be dropped, because that would bias the verifier.
        """
        return list(trees)

    def record_drafting(self, nodes: int, seconds: float) -> None:
        """Called at the end of a pass: drafting and learning took `seconds`, and gave `nodes` tokens for verification.

        Both are of all sequences together.
        """
        return

    def observe(self, outcome: Outcome) -> None:
        """Called after the draft of a sequence was verified."""
        return


class DraftLength(ABC):
    """How many tokens are drafted for a pass. needs_costs: whether it needs measured costs of the target's passes."""

    needs_costs: ClassVar[bool] = False

    @abstractmethod
    def max_tokens(self, limit: int) -> int:
        """The largest budget that it ever sets; 0 decodes without drafts. limit: upper bound of adaptive lengths."""

    @abstractmethod
    def start(self, measure_costs: Callable[[], PassCosts], limit: int) -> LengthController:
        """A controller for one decoding process; measure_costs is only called if needs_costs is true."""
