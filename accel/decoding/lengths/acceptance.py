"""Acceptance of drafted tokens, estimated while they are verified, by the classes that a drafter puts its nodes in."""

from collections.abc import Hashable

from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import ROOT, DraftTree

# Acceptance of a class of nodes before any was verified, and the number of observations that this prior is worth.
_PRIOR, _PRIOR_WEIGHT = 0.5, 2.0
# Older observations fade, because a text changes: the last ones, this many, weigh about as much as all before them.
_MEMORY = 400.0


class AcceptanceRate:
    """Share of the nodes of a class that were accepted where their parent was."""

    def __init__(self) -> None:
        self.seen = _PRIOR_WEIGHT
        self.accepted = _PRIOR * _PRIOR_WEIGHT

    def add(self, accepted: bool) -> None:
        """A node whose parent was accepted was verified."""
        if self.seen > _MEMORY:
            self.seen *= 0.5
            self.accepted *= 0.5
        self.seen += 1
        self.accepted += accepted

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.accepted / self.seen


class AcceptanceEstimate:
    """Acceptance rates of all classes of nodes."""

    def __init__(self) -> None:
        self._rates: dict[Hashable, AcceptanceRate] = {}

    def observe(self, outcome: Outcome) -> None:
        """Count every node whose parent was accepted."""
        tree = outcome.tree
        for parent in (ROOT, *outcome.path):
            for child in tree.children.get(parent, ()):
                self._rate(tree.label(child)).add(child in outcome.path)

    def probabilities(self, tree: DraftTree) -> list[float]:
        """Probability of each node that it is accepted, that of its parent included."""
        probabilities: list[float] = []
        for node, parent in enumerate(tree.parents):
            of_parent = 1.0 if parent == ROOT else probabilities[parent]
            probabilities.append(of_parent * self._rate(tree.label(node)).share)
        return probabilities

    def _rate(self, label: Hashable) -> AcceptanceRate:
        rate = self._rates.get(label)
        if rate is None:
            rate = self._rates[label] = AcceptanceRate()
        return rate


def prior_probability(rank: int) -> float:
    """Probability that the node of this rank in a draft, counted from 0, is accepted, before any was verified."""
    return _PRIOR ** (rank / 2 + 1)


def expected_rate(costs: PassCosts, max_nodes: int, sequences: int = 1) -> float:
    """Tokens per second of the best draft size up to max_nodes, with the prior acceptance."""
    rates, expected = [], 1.0
    for nodes in range(max_nodes + 1):
        expected += prior_probability(nodes - 1) if nodes else 0.0
        rates.append(expected * sequences / costs.seconds(1 + nodes, sequences))
    return max(rates)
