"""Adaptive draft length: as many tokens as pay at the measured cost of a pass and the acceptance seen so far.

A pass is worth its expected tokens minus what its seconds would have given at the rate of the whole run; the tree that
maximises this maximises tokens per second (renewal reward). The cost of a pass is measured at every tree size before
decoding starts, the acceptance of drafts while they are verified.
Sources of the parts: target efficiency, MoESD (arXiv:2505.19645); trees that grow where acceptance is likely, DySpec
(arXiv:2410.11744) and Sequoia (arXiv:2402.12374); sizes by measured latency, PPD (arXiv:2405.18628).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.acceptance import AcceptanceEstimate, prior_probability
from hasten.accel.decoding.lengths.base import DraftLength, LengthController
from hasten.accel.decoding.lengths.timing import DraftingTime, PassCosts
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError

# Drafts before the first decision on a pause, and between two pauses.
_FIRST_PROBES, _PROBES = 12, 3
# Weights of the newest observation in running means.
_LEARN, _RATE_LEARN = 0.1, 0.02
# Drafting that takes less than this share of a plain pass need not be saved.
_CHEAP = 0.05


@dataclass(frozen=True)
class Adaptive(DraftLength):
    """Measures, and drafts what pays.

    explore_every: passes from one to the next that requests the maximum budget and verifies up to explore_nodes nodes,
    however unlikely. explore_share: bound on the time that this takes on average, as a share of a plain pass.
    first_pause, longest_pause: passes without a draft while drafting does not pay; each pause doubles the one before.
    """

    explore_every: int = 32
    explore_nodes: int = 8
    explore_share: float = 0.03
    first_pause: int = 16
    longest_pause: int = 256
    needs_costs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("explore_every", self.explore_every >= 1, "1 or more"),
            ("explore_nodes", self.explore_nodes >= 0, "0 or more"),
            ("explore_share", self.explore_share >= 0, "0 or more"),
            ("first_pause", self.first_pause >= 1, "1 or more"),
            ("longest_pause", self.longest_pause >= self.first_pause, f"first_pause={self.first_pause} or more"),
        ):
            if not valid:
                raise UserError(f"{name}={getattr(self, name)} is wrong: expected {expected}")

    def max_tokens(self, limit: int) -> int:
        """The limit."""
        return limit

    def start(self, measure_costs: Callable[[], PassCosts], limit: int) -> "AdaptiveController":
        """A controller that has seen no draft yet."""
        return AdaptiveController(self, measure_costs(), limit)


class AdaptiveController(LengthController):
    """What an adaptive length measured and decided so far. costs: of the target's passes."""

    def __init__(self, settings: Adaptive, costs: PassCosts, max_nodes: int) -> None:
        self.settings, self.costs, self.max_nodes = settings, costs, max_nodes
        self._acceptance = AcceptanceEstimate()
        # Probability that the first, second, … node that the drafter proposes is accepted, a running mean.
        self._by_rank = [prior_probability(rank) for rank in range(max_nodes)]
        self._drafting = DraftingTime()
        self._sequences = 1
        self._rate = 0.0  # tokens per second of the whole run
        self._asked = 0
        self._passes = self._drafts = 0
        self._advantage = 0.0
        self._left = _FIRST_PROBES
        self._pause, self._paused = settings.first_pause, 0

    def budget(self, sequences: int) -> int:
        """Tokens that may pay for drafting them, or 0 while drafting does not pay."""
        if not self._rate:
            self._rate = self._plain_rate(sequences)
        elif sequences != self._sequences:  # the gain over plain decoding stays about the same
            self._rate *= self._plain_rate(sequences) / self._plain_rate(self._sequences)
        self._sequences = sequences
        self._passes += 1
        self._asked = 0
        if self._paused:
            self._paused -= 1
            return 0
        self._asked = self.max_nodes
        allowed = self._exploration_seconds(sequences)
        explores = self._passes % self.settings.explore_every == 0
        if self._drafts and (not explores or self._drafting.seconds(self.max_nodes) > allowed):
            self._asked = self._best_budget(sequences)
        return self._asked

    def select(self, tree: DraftTree, sequences: int, whole: bool) -> DraftTree:
        """The nodes whose expected tokens pay for their share of the pass."""
        gains = self._acceptance.probabilities(tree)
        for rank in range(self._asked):
            gain = gains[rank] if rank < len(gains) else 0.0
            self._by_rank[rank] += _LEARN * (gain - self._by_rank[rank])
        # A child gains less than its parent, so that the best nodes are closed under parents.
        order = sorted(range(len(tree)), key=lambda node: (-gains[node], node))
        plain = self._worth(0, 0.0, sequences)
        best, kept, total, worth = plain, 0, 0.0, plain
        for count, node in enumerate(order, start=1):
            total += gains[node]
            worth = self._worth(count, total, sequences)
            if worth > best:
                best, kept = worth, count
        drafting = self._rate * self._drafting.seconds(len(tree)) / sequences
        self._decide((worth if whole else best) - plain - drafting)
        if whole:
            return tree
        if self._passes % self.settings.explore_every == 0:
            kept = max(kept, min(len(tree), self._affordable_nodes(sequences)))
        return tree if kept == len(tree) else tree.keep(sorted(order[:kept]))

    def record_drafting(self, nodes: int, seconds: float) -> None:
        """Learn what drafting takes. The target's own passes are read from the measured costs, free of other load."""
        if self._asked:
            self._drafts += 1
            if self._drafts > 1:  # the first one fills caches
                self._drafting.add(self._asked if nodes else 0, seconds)

    def observe(self, outcome: Outcome) -> None:
        """Learn the acceptance of every class that was verified, and the rate of the run."""
        self._acceptance.observe(outcome)
        spent = self.costs.seconds(len(outcome.tree) + 1, self._sequences)
        if self._asked:
            spent += self._drafting.seconds(self._asked)
        self._rate += _RATE_LEARN * ((len(outcome.path) + 1) * self._sequences / spent - self._rate)

    def _exploration_seconds(self, sequences: int) -> float:
        """Seconds that one exploring pass may take above what pays."""
        settings = self.settings
        return settings.explore_share * settings.explore_every * self.costs.seconds(1, sequences)

    def _affordable_nodes(self, sequences: int) -> int:
        """Nodes that an exploring pass verifies whatever their acceptance."""
        allowed = self._exploration_seconds(sequences) + self.costs.seconds(1, sequences)
        sizes = range(self.settings.explore_nodes, 0, -1)
        return next((size for size in sizes if self.costs.seconds(size + 1, sequences) <= allowed), 0)

    def _best_budget(self, sequences: int) -> int:
        best, budget, total = -1.0, 1, 0.0
        for count in range(1, self.max_nodes + 1):
            total += self._by_rank[count - 1]
            worth = self._worth(count, total, sequences) - self._rate * self._drafting.seconds(count) / sequences
            if worth > best or count == 1:
                best, budget = worth, count
        # Twice the best budget, because drafts differ: where a few nodes more cost the drafter little.
        doubled = self._drafting.seconds(min(self.max_nodes, 2 * budget))
        if doubled < _CHEAP * self.costs.seconds(1, sequences):
            return min(self.max_nodes, max(self.settings.explore_nodes, 2 * budget))
        return budget

    def _decide(self, advantage: float) -> None:
        """Stop drafting for a while where it does not pay: longer each time, until it pays again."""
        if self._paused:  # another sequence of this pass decided
            return
        self._advantage += _LEARN * (advantage - self._advantage)
        self._left -= 1
        if self._left > 0:
            return
        if self._advantage < 0:
            self._paused, self._pause = self._pause, min(2 * self._pause, self.settings.longest_pause)
            self._left, self._advantage = _PROBES, 0.0
        else:
            self._pause = self.settings.first_pause

    def _plain_rate(self, sequences: int) -> float:
        return sequences / self.costs.seconds(1, sequences)

    def _worth(self, nodes: int, gain: float, sequences: int) -> float:
        """Expected tokens of a pass over `nodes` drafted nodes, above those that its time gives anyway."""
        return 1 + gain - self._rate * self.costs.seconds(nodes + 1, sequences) / sequences
