"""How many tokens to draft: as many as pay at the measured cost of a pass and the acceptance seen so far.

A pass is worth its expected tokens less what its seconds would have given at the rate of the whole run; the tree that
maximises this maximises tokens per second (a renewal reward). The cost of a pass is measured at every tree size before
decoding starts, the acceptance of drafts while they are verified, by the classes that a drafter puts its nodes in.
Sources of the parts: target efficiency, MoESD (arXiv:2505.19645); trees that grow where acceptance is likely, DySpec
(arXiv:2410.11744) and Sequoia (arXiv:2402.12374); sizes by measured latency, PPD (arXiv:2405.18628).
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from time import perf_counter, process_time

import torch

from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import ROOT, DraftTree

# Passes that are timed at every size, and the seconds after which fewer will do.
_REPEATS, _MOST_SECONDS = 5, 0.3
# Old observations fade, as a text changes: this many count about as much as all before them.
_MEMORY = 400.0
# What is believed of a class of nodes that was never verified, and how many observations that belief is worth.
_PRIOR, _PRIOR_WEIGHT = 0.5, 2.0
# Passes without a draft while drafting does not pay: the first pause, and the longest. Drafts before the first one may
# come, and between two of them.
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256
_FIRST_PROBES, _PROBES = 12, 3
# Once in so many passes a drafter is asked for all that it may give and some nodes are verified whatever they promise.
_EXPLORE_EVERY, _EXPLORED = 32, 8
# Share of a plain pass's time that this may take on average.
_EXPLORING = 0.03
_LEARN, _FADE = 0.1, 0.02
# Drafting that takes less than this share of a plain pass need not be saved.
_CHEAP = 0.05


class Policy(ABC):
    """Decides before every pass how many tokens a drafter may propose, and which of them are worth a place in it.

    most: the largest tree that it ever asks for.
    """

    most: int

    @abstractmethod
    def budget(self, sequences: int) -> int:
        """Nodes that each of so many sequences may draft; 0 is none."""

    def select(self, tree: DraftTree, sequences: int, whole: bool) -> DraftTree:
        """The part of a tree that is verified; whole: all of it, because leaving nodes out would bias the verifier."""
        return tree

    def drafted(self, nodes: int, seconds: float) -> None:
        """Drafting for all sequences took so long and gave so many nodes."""
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


class Costs:
    """Seconds of a pass by the tokens of each sequence in it, for one and for several sequences at once.

    What lies between two measured sizes is interpolated; beyond the largest the last step goes on.
    """

    def __init__(self, measured: Mapping[int, Mapping[int, float]]) -> None:
        self.measured = {count: dict(sorted(by_width.items())) for count, by_width in sorted(measured.items())}
        # Sizing asks dozens of times before every pass.
        self._known: dict[tuple[int, int], float] = {}

    def seconds(self, width: int, sequences: int = 1) -> float:
        """Of a pass of so many tokens in each of so many sequences."""
        found = self._known.get((width, sequences))
        if found is None:
            found = self._known[width, sequences] = self._interpolated(width, sequences)
        return found

    def _interpolated(self, width: int, sequences: int) -> float:
        counts = list(self.measured)
        # Few sequences are like one, many like the most that were measured.
        count = min(counts, key=lambda each: abs(each - sequences))
        by_width = self.measured[count]
        widths = list(by_width)
        index = min(bisect_left(widths, width), len(widths) - 1)
        if widths[index] == width or index == 0:
            found = by_width[widths[index]]
        else:
            low, high = widths[index - 1], widths[index]
            slope = (by_width[high] - by_width[low]) / (high - low)
            found = by_width[low] + slope * (width - low)
        return found * max(1.0, sequences / count) if sequences > count else found

    def efficiency(self, width: int, sequences: int = 1) -> float:
        """Target efficiency: the cost of a plain pass over that of one of so many tokens a sequence."""
        return self.seconds(1, sequences) / self.seconds(width, sequences)


def clock(target: Target) -> Callable[[], float]:
    """What seconds are counted by: of this process on one CPU thread, so that others on the machine do not count."""
    return process_time if target.device.type == "cpu" and torch.get_num_threads() == 1 else perf_counter


def measure_costs(target: Target, widths: Sequence[int], sequences: int = 1, context: int = 128) -> Costs:
    """Costs of passes of a target over some widths, at a context of so many tokens; for 1 and `sequences` at once.

    The target's caches are made anew. Of several passes the quickest counts: what else runs can only slow them down.
    """
    widths = sorted({1, *(min(width, target.max_length - 1) for width in widths)})
    context = max(1, min(context, target.max_length - widths[-1]))
    target.reserve(sequences, context + widths[-1])
    for slot in range(sequences):
        target.prefill(slot, [0] * context)
    now = clock(target)
    measured: dict[int, dict[int, float]] = {}
    for count in sorted({1, sequences}):
        measured[count] = {}
        for width in widths:
            seconds = []
            for repeat in range(_REPEATS + 1):
                started = now()
                logits = target.forward(range(count), [[0] * width] * count, [range(ROOT, width - 1)] * count).logits
                float(logits[0, 0, 0])  # waits for the device
                seconds.append(now() - started)
                for slot in range(count):
                    target.commit(slot, [])
                if repeat and sum(seconds) > _MOST_SECONDS:
                    break
            measured[count][width] = min(seconds[1:])  # the first one compiles
    return Costs(measured)


def expected_rate(costs: Costs, most: int, sequences: int = 1) -> float:
    """Tokens per second of the tree size that promises most, with the acceptance that is believed before any."""
    rates, expected = [], 1.0
    for nodes in range(most + 1):
        expected += _believed(nodes - 1) if nodes else 0.0
        rates.append(expected * sequences / costs.seconds(1 + nodes, sequences))
    return max(rates)


def _believed(rank: int) -> float:
    """Probability that the first, second, … node of a draft is accepted, before any was."""
    return _PRIOR ** (rank / 2 + 1)


class _Acceptance:
    """Share of nodes of a class that were accepted where their parent was."""

    def __init__(self) -> None:
        self.seen = _PRIOR_WEIGHT
        self.accepted = _PRIOR * _PRIOR_WEIGHT

    def add(self, accepted: bool) -> None:
        if self.seen > _MEMORY:
            self.seen *= 0.5
            self.accepted *= 0.5
        self.seen += 1
        self.accepted += accepted

    @property
    def share(self) -> float:
        return self.accepted / self.seen


class _Line:
    """Seconds as a line over a number of nodes, fitted to what was seen lately."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        fade = 1 - _FADE
        self._n, self._x, self._y = fade * self._n + 1, fade * self._x + x, fade * self._y + y
        self._xx, self._xy = fade * self._xx + x * x, fade * self._xy + x * y

    def at(self, x: float) -> float:
        if not self._n:
            return 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        # Where all were alike, the time is taken as the nodes' own.
        slope = (
            (self._xy / self._n - mean_x * mean_y) / spread if spread > 0.05 * mean_x**2 else mean_y / max(mean_x, 1)
        )
        slope = min(max(slope, 0.0), mean_y / max(mean_x, 1e-9))
        return max(0.0, mean_y + slope * (x - mean_x))


class Adaptive(Policy):
    """Measures, and drafts what pays.

    costs: of the target's passes. most: the largest tree.
    """

    def __init__(self, costs: Costs, most: int) -> None:
        self.costs, self.most = costs, most
        self._classes: dict[Hashable, _Acceptance] = {}
        # Probability that the first, second, … node that the drafter puts forward is accepted, a running mean.
        self._by_rank = [_believed(rank) for rank in range(most)]
        self._drafting = _Line()
        self._sequences = 1
        self._rate = 0.0
        self._asked = 0
        self._passes = self._drafts = 0
        self._advantage = 0.0
        self._left = _FIRST_PROBES
        self._pause, self._paused = _FIRST_PAUSE, 0

    def budget(self, sequences: int) -> int:
        """Nodes to ask a drafter for: those that may pay for drafting them, or none while drafting does not pay."""
        if not self._rate:
            self._rate = self._plain_rate(sequences)
        elif sequences != self._sequences:  # what drafting gives above plain decoding stays about the same
            self._rate *= self._plain_rate(sequences) / self._plain_rate(self._sequences)
        self._sequences = sequences
        self._passes += 1
        self._asked = 0
        if self._paused:
            self._paused -= 1
            return 0
        self._asked = self.most
        allowed = self._allowed(sequences)
        if self._drafts and (self._passes % _EXPLORE_EVERY or self._drafting.at(self.most) > allowed):
            self._asked = self._best_budget(sequences)
        return self._asked

    def select(self, tree: DraftTree, sequences: int, whole: bool) -> DraftTree:
        """The nodes whose expected tokens pay for their share of the pass."""
        gains = self._expected(tree)
        for rank in range(self._asked):
            gain = gains[rank] if rank < len(gains) else 0.0
            self._by_rank[rank] += _LEARN * (gain - self._by_rank[rank])
        # A child gains less than its parent, so that the best ones are closed under parents.
        order = sorted(range(len(tree)), key=lambda node: (-gains[node], node))
        plain = self._worth(0, 0.0, sequences)
        best, kept, total, everything = plain, 0, 0.0, plain
        for count, node in enumerate(order, start=1):
            total += gains[node]
            everything = self._worth(count, total, sequences)
            if everything > best:
                best, kept = everything, count
        drafting = self._rate * self._drafting.at(len(tree)) / sequences
        self._decide((everything if whole else best) - plain - drafting)
        if whole:
            return tree
        if self._passes % _EXPLORE_EVERY == 0:
            extra = self._allowed(sequences) + self.costs.seconds(1, sequences)
            affordable = (n for n in range(_EXPLORED, 0, -1) if self.costs.seconds(n + 1, sequences) <= extra)
            kept = max(kept, min(len(tree), next(affordable, 0)))
        return tree if kept == len(tree) else tree.keep(sorted(order[:kept]))

    def drafted(self, nodes: int, seconds: float) -> None:
        """Count what drafting takes; passes of the target go by the curve, which nothing else that runs disturbs."""
        if self._asked:
            self._drafts += 1
            if self._drafts > 1:  # the first one fills caches
                self._drafting.add(self._asked if nodes else 0, seconds)

    def observe(self, outcome: Outcome) -> None:
        """Learns the acceptance of every class that had a chance, and the rate of the run."""
        tree = outcome.tree
        for parent in (ROOT, *outcome.path):
            for child in tree.children.get(parent, ()):
                self._class(tree.label(child)).add(child in outcome.path)
        spent = self.costs.seconds(len(tree) + 1, self._sequences)
        if self._asked:
            spent += self._drafting.at(self._asked)
        self._rate += _FADE * ((len(outcome.path) + 1) * self._sequences / spent - self._rate)

    def _allowed(self, sequences: int) -> float:
        """Seconds that looking further than what pays may take, once in a while."""
        return _EXPLORING * _EXPLORE_EVERY * self.costs.seconds(1, sequences)

    def _best_budget(self, sequences: int) -> int:
        best, found, total = -1.0, 1, 0.0
        for count in range(1, self.most + 1):
            total += self._by_rank[count - 1]
            worth = self._worth(count, total, sequences) - self._rate * self._drafting.at(count) / sequences
            if worth > best or count == 1:
                best, found = worth, count
        # Twice as many, as the best of one draft are not those of another; few nodes more cost a drafter little.
        cheap = self._drafting.at(min(self.most, 2 * found)) < _CHEAP * self.costs.seconds(1, sequences)
        return min(self.most, max(_EXPLORED, 2 * found)) if cheap else found

    def _decide(self, advantage: float) -> None:
        """Stop drafting for a while where it does not pay: longer each time, until it pays again."""
        if self._paused:  # another sequence of this pass decided
            return
        self._advantage += 0.1 * (advantage - self._advantage)
        self._left -= 1
        if self._left > 0:
            return
        if self._advantage < 0:
            self._paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
            self._left, self._advantage = _PROBES, 0.0
        else:
            self._pause = _FIRST_PAUSE

    def _plain_rate(self, sequences: int) -> float:
        return sequences / self.costs.seconds(1, sequences)

    def _worth(self, nodes: int, gain: float, sequences: int) -> float:
        """Tokens that a sequence's pass over so many nodes gives above what its time gives anyway."""
        return 1 + gain - self._rate * self.costs.seconds(nodes + 1, sequences) / sequences

    def _expected(self, tree: DraftTree) -> list[float]:
        """Probability that each node is accepted."""
        gains: list[float] = []
        for node, parent in enumerate(tree.parents):
            above = 1.0 if parent == ROOT else gains[parent]
            gains.append(above * self._class(tree.label(node)).share)
        return gains

    def _class(self, label: Hashable) -> _Acceptance:
        found = self._classes.get(label)
        if found is None:
            found = self._classes[label] = _Acceptance()
        return found
