"""Adaptive draft length: the number of tokens that pays, by the measured cost of a pass and the observed acceptance.

The gain of a pass is its expected tokens minus the tokens that its seconds yield at the mean rate of the run; the tree
that maximises this maximises tokens per second (renewal reward). The cost of a pass is measured at every tree size
before decoding starts; acceptance is estimated while drafts are verified.
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

# Number of drafts before the first decision on a pause, and between two pauses.
_FIRST_PROBES, _PROBES = 12, 3
# Weight of the newest observation in running means: of acceptance and gain, and of the rate.
_LEARN, _RATE_LEARN = 0.1, 0.02
# Drafting is cheap if it takes less than this share of a pass without drafts.
_CHEAP = 0.05


@dataclass(frozen=True)
class Adaptive(DraftLength):
    """Drafts as many tokens as pay.

    explore_every: every so many passes one explores: it requests the maximum budget, and verifies up to explore_nodes
    nodes whatever their expected acceptance. explore_share: bound of the mean time of exploring, as a share of a pass
    without drafts. first_pause, longest_pause: number of passes without drafts while drafting does not pay; each pause
    is twice as long as the one before.
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
    """State of an adaptive draft length. costs: seconds of the target's passes."""

    def __init__(self, settings: Adaptive, costs: PassCosts, max_nodes: int) -> None:
        self.settings, self.costs, self.max_nodes = settings, costs, max_nodes
        self._acceptance = AcceptanceEstimate()
        # Running mean of the probability that the first, second, … node of a draft is accepted.
        self._by_rank = [prior_probability(rank) for rank in range(max_nodes)]
        self._drafting = DraftingTime()
        self._sequences = 1
        self._rate = 0.0  # tokens per second of the whole run
        self._requested = 0
        self._passes = self._drafts = 0
        self._advantage = 0.0
        self._drafts_until_decision = _FIRST_PROBES
        self._pause, self._pause_left = settings.first_pause, 0

    def budget(self, sequences: int) -> int:
        """The number of tokens to draft, 0 during a pause."""
        if not self._rate:
            self._rate = self._plain_rate(sequences)
        elif sequences != self._sequences:  # the speedup over decoding without drafts stays about the same
            self._rate *= self._plain_rate(sequences) / self._plain_rate(self._sequences)
        self._sequences = sequences
        self._passes += 1
        self._requested = 0
        if self._pause_left:
            self._pause_left -= 1
            return 0
        self._requested = self.max_nodes
        allowed = self._exploration_seconds(sequences)
        explores = self._passes % self.settings.explore_every == 0
        if self._drafts and (not explores or self._drafting.seconds(self.max_nodes) > allowed):
            self._requested = self._best_budget(sequences)
        return self._requested

    def limit(self, nodes: int) -> None:
        """Learn from the tokens that are drafted, not from those that were requested."""
        self._requested = min(self._requested, nodes)

    def select(self, tree: DraftTree, sequences: int, whole: bool) -> DraftTree:
        """The nodes whose expected tokens are worth the time that they add to the pass."""
        gains = self._acceptance.probabilities(tree)
        for rank in range(self._requested):
            gain = gains[rank] if rank < len(gains) else 0.0
            self._by_rank[rank] += _LEARN * (gain - self._by_rank[rank])
        # A child's gain is below its parent's, so the best nodes include the parents of all of them.
        order = sorted(range(len(tree)), key=lambda node: (-gains[node], node))
        plain = self._net_tokens(0, 0.0, sequences)
        best, kept, total, net = plain, 0, 0.0, plain
        for count, node in enumerate(order, start=1):
            total += gains[node]
            net = self._net_tokens(count, total, sequences)
            if net > best:
                best, kept = net, count
        drafting = self._rate * self._drafting.seconds(len(tree)) / sequences
        self._decide((net if whole else best) - plain - drafting)
        if whole:
            return tree
        if self._passes % self.settings.explore_every == 0:
            kept = max(kept, min(len(tree), self._affordable_nodes(sequences)))
        return tree if kept == len(tree) else tree.keep(sorted(order[:kept]))

    def record_drafting(self, nodes: int, seconds: float) -> None:
        """Learn the time of drafting. That of the target's passes was measured before, when nothing else ran."""
        if self._requested:
            self._drafts += 1
            if self._drafts > 1:  # the first one allocates memory or compiles, and is not typical
                self._drafting.add(self._requested if nodes else 0, seconds)

    def observe(self, outcome: Outcome) -> None:
        """Update the acceptance of the verified classes of nodes, and the rate of the run."""
        self._acceptance.observe(outcome)
        spent = self.costs.seconds(len(outcome.tree) + 1, self._sequences)
        if self._requested:
            spent += self._drafting.seconds(self._requested)
        self._rate += _RATE_LEARN * (len(outcome.committed) * self._sequences / spent - self._rate)

    def _exploration_seconds(self, sequences: int) -> float:
        """Extra seconds that one exploring pass may take."""
        settings = self.settings
        return settings.explore_share * settings.explore_every * self.costs.seconds(1, sequences)

    def _affordable_nodes(self, sequences: int) -> int:
        """Number of nodes that an exploring pass may verify whatever their expected acceptance."""
        allowed = self._exploration_seconds(sequences) + self.costs.seconds(1, sequences)
        sizes = range(self.settings.explore_nodes, 0, -1)
        return next((size for size in sizes if self.costs.seconds(size + 1, sequences) <= allowed), 0)

    def _best_budget(self, sequences: int) -> int:
        best, budget, total = -1.0, 1, 0.0
        for count in range(1, self.max_nodes + 1):
            total += self._by_rank[count - 1]
            net = self._net_tokens(count, total, sequences) - self._rate * self._drafting.seconds(count) / sequences
            if net > best or count == 1:
                best, budget = net, count
        # Drafts differ in acceptance: where drafting is cheap, a doubled budget lets `select` choose the nodes.
        doubled_seconds = self._drafting.seconds(min(self.max_nodes, 2 * budget))
        if doubled_seconds < _CHEAP * self.costs.seconds(1, sequences):
            return min(self.max_nodes, max(self.settings.explore_nodes, 2 * budget))
        return budget

    def _decide(self, advantage: float) -> None:
        """Pause drafting if it does not pay; each pause is longer than the one before, until drafting pays again."""
        if self._pause_left:  # another sequence of this pass has started the pause
            return
        self._advantage += _LEARN * (advantage - self._advantage)
        self._drafts_until_decision -= 1
        if self._drafts_until_decision > 0:
            return
        if self._advantage < 0:
            self._pause_left, self._pause = self._pause, min(2 * self._pause, self.settings.longest_pause)
            self._drafts_until_decision, self._advantage = _PROBES, 0.0
        else:
            self._pause = self.settings.first_pause

    def _plain_rate(self, sequences: int) -> float:
        return sequences / self.costs.seconds(1, sequences)

    def _net_tokens(self, nodes: int, gain: float, sequences: int) -> float:
        """Expected tokens of a pass over `nodes` drafted nodes, minus those that its seconds yield at the mean rate."""
        return 1 + gain - self._rate * self.costs.seconds(nodes + 1, sequences) / sequences
