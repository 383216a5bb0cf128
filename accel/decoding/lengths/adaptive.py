"""Adaptive draft length: the number of tokens that pays, by the measured cost of a pass and the observed acceptance.

The gain of a pass is its expected tokens minus the tokens that its seconds yield at the mean rate of the run; the tree
that maximises this maximises tokens per second (renewal reward). The cost of a pass is measured at every tree size
before decoding starts. Acceptance is estimated from the text that follows a proposal, so that a proposal teaches even
if it is not verified. Where drafting does not pay it pauses, and the pauses grow. Before several sequences are drafted
for, at first and after every pause, the drafts of one of them are compared with its text and not verified, which costs
next to nothing; where drafts are not expected to pay, a pause comes before that.
Sources of the parts: target efficiency, MoESD (arXiv:2505.19645); trees that grow where acceptance is likely, DySpec
(arXiv:2410.11744) and Sequoia (arXiv:2402.12374); sizes by measured latency, PPD (arXiv:2405.18628).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.acceptance import AcceptanceEstimate, prior_probability
from hasten.accel.decoding.lengths.base import DraftLength, LengthController
from hasten.accel.decoding.lengths.timing import DraftingTime, PassCosts
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import check_fields

# Number of drafts before the first decision on a pause, and between two pauses.
_FIRST_PROBES, _PROBES = 64, 4
# A first pause of several sequences takes this many times that of one: to read all prompts takes long.
_MANY_PAUSES = 4
# Largest mean gain, in tokens of a sequence's pass, that is remembered: drafts of the next text may be bad.
_REMEMBERED = 0.5
# Weight of the newest observation in running means: of acceptance and gain, and of the rate.
_LEARN, _RATE_LEARN = 0.1, 0.02
# Several sequences are drafted for, and prompts observed, if drafting gains this share of the rate of plain decoding;
# passes before the gain is known.
_WORTHWHILE_GAIN, _SETTLED = 0.1, 64
# Number of passes that a budget is kept for, because finding it takes as long as a small draft.
_BUDGET_PASSES = 4
# Share of the expected tokens that is counted on: of several sizes the best one is mostly one that is overestimated.
_TRUSTED = 0.9
# Drafting goes on where it costs less than this share of a pass.
_NEGLIGIBLE = 0.004
# A larger budget is cheap if drafting takes longer by less than this share of a pass without drafts.
_CHEAP = 0.05


@dataclass(frozen=True)
class Adaptive(DraftLength):
    """Drafts as many tokens as pay.

    explore_every: every so many passes one explores: it requests the maximum budget, and verifies up to explore_nodes
    nodes whatever their expected acceptance. explore_share: bound of the mean time of exploring, as a share of a pass
    without drafts. first_pause, longest_pause: number of passes without drafts while drafting does not pay; each pause
    is twice as long as the one before. Of several sequences, the first is four times as long.
    """

    explore_every: int = 32
    explore_nodes: int = 8
    explore_share: float = 0.01
    first_pause: int = 16
    longest_pause: int = 256
    needs_costs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("explore_every", self.explore_every >= 1, "1 or more"),
            ("explore_nodes", self.explore_nodes >= 0, "0 or more"),
            ("explore_share", self.explore_share >= 0, "0 or more"),
            ("first_pause", self.first_pause >= 1, "1 or more"),
            ("longest_pause", self.longest_pause >= self.first_pause, f"first_pause={self.first_pause} or more"),
        )

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
        self._sequences = self._most = 1  # of the latest pass, and of any
        self._rate = 0.0  # tokens per second of the whole run
        self._requested = self._width = self._virtual = 0
        self._virtual_of: Callable[[int], int] = lambda budget: 0
        self._passes = self._drafts = 0
        self._budget = self._budget_sequences = self._budget_until = 0
        self._advantage = 0.0
        self._drafts_until_decision = _FIRST_PROBES
        self._pause, self._pause_left = settings.first_pause, 0
        self._probing = False
        self._paused_at = 0  # number of sequences at which drafting was not yet found to pay; 0 if it pays

    def begin_sequence(self) -> None:
        """A pause of a sequence that was alone ends with it."""
        if self._paused_at == 1:
            self._end_pause(1)

    def budget(self, sequences: int) -> int:
        """The number of tokens to draft, 0 during a pause."""
        if not self._rate:
            self._rate = self._plain_rate(sequences)
        elif sequences != self._sequences:  # the speedup over decoding without drafts stays about the same
            self._rate *= self._plain_rate(sequences) / self._plain_rate(self._sequences)
        if sequences >= 2 * self._most:
            if self._is_promising(sequences):
                self._begin_probes(sequences)
            else:
                self._begin_pause(sequences)
        elif 2 * sequences <= self._paused_at and self._is_promising(sequences):
            self._end_pause(sequences)
        self._most = max(self._most, sequences)
        self._sequences = sequences
        self._passes += 1
        self._requested = self._width = self._virtual = 0
        self._probing = False
        if self._pause_left:
            self._pause_left -= 1
            return 0
        # What a drafter with virtual tokens proposes, it has learned from a pass with them in it.
        self._probing = self._paused_at > 1 and sequences > 1 and not self._virtual_of(self.max_nodes)
        self._requested = self.max_nodes
        allowed = self._exploration_seconds(sequences)
        explores = self._passes % self.settings.explore_every == 0
        if self._drafts and (not explores or self._drafting.seconds(self.max_nodes) > allowed):
            if self._passes >= self._budget_until or sequences != self._budget_sequences:
                self._budget, self._budget_sequences = self._best_budget(sequences), sequences
                self._budget_until = self._passes + _BUDGET_PASSES
            self._requested = self._budget
        self._virtual = self._virtual_of(self._requested)
        return self._requested

    def count_virtual(self, max_virtual_nodes: Callable[[int], int]) -> None:
        """Passes cost what their virtual nodes cost, too."""
        self._virtual_of = max_virtual_nodes

    def observes_prompt(self, sequences: int) -> bool:
        """Whether drafting gains enough to pay for a pass of the output layer over a part of the prompt."""
        if self._passes < _SETTLED:
            return self._is_promising(sequences)
        return self._rate > (1 + _WORTHWHILE_GAIN) * self._plain_rate(self._sequences)

    def _is_promising(self, sequences: int) -> bool:
        """Whether drafts of the best size gain, by the acceptance and the time of drafting so far."""
        plain, expected = self._plain_rate(sequences), 1.0
        for nodes, gain in enumerate(self._by_rank, 1):
            expected += gain
            drafting = self._drafting.seconds(nodes) * self._growth(self._sequences, sequences)
            seconds = self.costs.seconds(nodes + 1, sequences) + drafting
            if expected * sequences / seconds > (1 + _WORTHWHILE_GAIN) * plain:
                return True
        return False

    def _growth(self, before: int, after: int) -> float:
        """Seconds of drafting for `after` sequences over those for `before`: the target's passes stand for a head's."""
        return self.costs.seconds(1, after) / self.costs.seconds(1, before)

    def probes(self) -> bool:
        """With several sequences, until drafting is found to pay."""
        return self._probing

    def learns(self) -> bool:
        """Whether drafters learn from the pass: not in a pause, until shortly before its end.

        Where drafting does not pay, learning would take the larger part of its time.
        """
        # The last quarter of the pause; _pause is already the length of the next one.
        return self._pause_left < max(self.settings.first_pause, self._pause // 4) // 2

    def limit(self, nodes: int) -> None:
        """Learn from the tokens that are drafted, not from those that were requested."""
        self._requested = min(self._requested, nodes)

    def select(self, trees: Sequence[DraftTree], sequences: int, whole: Sequence[bool]) -> list[DraftTree]:
        """The nodes whose expected tokens are worth the time that they add to the pass.

        All sequences of a pass are as wide as the widest one, so all of them get the same number of nodes.
        """
        gains = [self._acceptance.probabilities(tree) for tree in trees]
        for of_tree in gains:
            for rank in range(self._requested - self._virtual):
                gain = of_tree[rank] if rank < len(of_tree) else 0.0
                self._by_rank[rank] += _LEARN * (gain - self._by_rank[rank])
        # A child's gain is below its parent's, so the best nodes include the parents of all of them.
        orders = [
            sorted(range(len(tree)), key=lambda node: (-of[node], node)) for tree, of in zip(trees, gains, strict=True)
        ]
        kept_whole = [(len(tree), sum(of)) for tree, of, all_of in zip(trees, gains, whole, strict=True) if all_of]
        first = max((nodes for nodes, _ in kept_whole), default=0)
        total = sum(gain for _, gain in kept_whole)
        added = [0.0] * max(map(len, trees))  # expected tokens of the n-th best node of every tree
        for order, of, all_of in zip(orders, gains, whole, strict=True):
            if not all_of:
                for place, node in enumerate(order):
                    added[place] += of[node]
        if self._probing:
            # One sequence stands for all of them. To begin costs more than a draft, such as reading all prompts.
            added = [_TRUSTED * sequences * gain for gain in added]
        total += sum(added[:first])
        plain = self._net_tokens(0, 0.0, sequences)
        width, gain, virtual = first, total, self._virtual
        best = self._net_tokens(first + virtual, _TRUSTED * total, sequences) if kept_whole or virtual else plain
        for nodes in range(first + 1, len(added) + 1):
            total += added[nodes - 1]
            net = self._net_tokens(nodes + virtual, _TRUSTED * total, sequences)
            if net > best:
                best, width, gain = net, nodes, total
        drafting = self._rate * self._drafting.seconds(self._requested if added else 0)
        self._decide(self._net_tokens(width + virtual, gain, sequences) - plain - drafting, sequences)
        if self._probing:
            self._width = 0
            return [tree.first(0) for tree in trees]
        if self._passes % self.settings.explore_every == 0:
            width = max(width, self._affordable_nodes(sequences) - virtual)
        self._width = min(width, len(added))
        return [
            tree if all_of or width >= len(tree) else tree.keep(sorted(order[:width]))
            for tree, order, all_of in zip(trees, orders, whole, strict=True)
        ]

    def record_drafting(self, nodes: int, seconds: float) -> None:
        """Learn the time of drafting. That of the target's passes was measured before, when nothing else ran."""
        if self._requested:
            self._drafts += 1
            if self._probing:
                seconds *= self._growth(1, self._sequences)
            if self._drafts > 1:  # the first one allocates memory or compiles, and is not typical
                self._drafting.add(self._requested if nodes or self._probing else 0, seconds)

    def observe(self, outcome: Outcome) -> None:
        """Update the acceptance of the verified classes of nodes, and the rate of the run."""
        self._acceptance.observe(outcome)
        spent = self.costs.seconds(self._width + self._virtual + 1, self._sequences)
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
        best, budget = -1.0, 1
        gains = [0.0, *accumulate(self._by_rank)]
        for count in range(1, self.max_nodes + 1):
            # Virtual nodes cost as much as others, and gain nothing in this pass.
            total = gains[count - self._virtual_of(count)]
            net = self._net_tokens(count, total * sequences, sequences) - self._rate * self._drafting.seconds(count)
            if net > best or count == 1:
                best, budget = net, count
        # Drafts differ in acceptance: where drafting is cheap, a doubled budget lets `select` choose the nodes.
        doubled = min(self.max_nodes, max(self.settings.explore_nodes, 2 * budget))
        added = self._drafting.seconds(doubled) - self._drafting.seconds(budget)
        return doubled if added < _CHEAP * self.costs.seconds(1, sequences) else budget

    def _decide(self, advantage: float, sequences: int) -> None:
        """Pause drafting if it does not pay; each pause is longer than the one before, until drafting pays again.

        advantage: expected tokens of a pass over `sequences` sequences, more than without a draft.
        """
        gain = advantage / sequences
        if self._probing:
            self._drafts_until_decision -= 1
            self._advantage += (gain - self._advantage) / (_PROBES - self._drafts_until_decision)
            pays = self._advantage > _WORTHWHILE_GAIN
        else:
            self._drafts_until_decision -= sequences
            self._advantage = min(self._advantage + _LEARN * (gain - self._advantage), _REMEMBERED)
            pays = self._advantage >= -_NEGLIGIBLE
        if self._drafts_until_decision > 0:
            return
        if pays:
            if self._paused_at:
                self._advantage = 0.0  # the next drafts decide
            self._pause, self._paused_at = self.settings.first_pause, 0
        else:
            self._begin_pause(sequences)

    def _begin_pause(self, sequences: int) -> None:
        longest = self.settings.longest_pause
        least = self.settings.first_pause * (1 if sequences == 1 else _MANY_PAUSES)
        self._pause_left = min(max(self._pause, least), longest)
        self._pause = min(2 * self._pause_left, longest)
        self._begin_probes(sequences)

    def _end_pause(self, sequences: int) -> None:
        self._pause, self._pause_left = self.settings.first_pause, 0
        self._begin_probes(sequences)

    def _begin_probes(self, sequences: int) -> None:
        self._drafts_until_decision, self._advantage, self._paused_at = _PROBES, 0.0, sequences

    def _plain_rate(self, sequences: int) -> float:
        return sequences / self.costs.seconds(1, sequences)

    def _net_tokens(self, nodes: int, gain: float, sequences: int) -> float:
        """Expected tokens of a pass over `nodes` drafted nodes a sequence, minus those that its time yields on average.

        gain: expected accepted tokens of all sequences.
        """
        return sequences + gain - self._rate * self.costs.seconds(nodes + 1, sequences)
