"""The interface of a draft length: before a pass it gives the drafter a budget, after it, it learns from the outcome.

A `DraftLength` is a frozen dataclass of hyper-parameters. What it learns while decoding is in the `LengthController`
that it starts, one for each verifier.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import DraftTree


class LengthController(ABC):
    """Decides before every pass how many tokens a drafter may propose, and which of them are verified.

    max_nodes: the largest draft that it ever asks for.
    """

    max_nodes: int

    @abstractmethod
    def budget(self, sequences: int) -> int:
        """Tokens that may be drafted for each of the `sequences` of the next pass; 0 is none."""

    def select(self, tree: DraftTree, sequences: int, whole: bool) -> DraftTree:
        """The part of a draft that is verified; whole: all of it, because leaving nodes out would bias the verifier."""
        return tree

    def record_drafting(self, nodes: int, seconds: float) -> None:
        """Drafting for all sequences of a pass took `seconds` and gave `nodes` tokens in all."""
        return

    def observe(self, outcome: Outcome) -> None:
        """A sequence was verified."""
        return


class DraftLength(ABC):
    """How many tokens are drafted for a pass. needs_costs: it reads how long the target's passes take."""

    needs_costs: ClassVar[bool] = False

    @abstractmethod
    def max_tokens(self, limit: int) -> int:
        """The largest draft that it ever asks for; 0 decodes without drafts. limit: bound for lengths that adapt."""

    @abstractmethod
    def start(self, measure_costs: Callable[[], PassCosts], limit: int) -> LengthController:
        """The controller of one decoding process; measure_costs is only called where needs_costs is true."""
