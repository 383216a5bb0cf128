"""Estimates of the acceptance of drafted tokens, by class of node (`DraftTree.labels`), from verified drafts."""

from collections.abc import Hashable

from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import ROOT, DraftTree

# Prior acceptance of a class of nodes, and the number of observations that it counts as.
_PRIOR, _PRIOR_WEIGHT = 0.5, 2.0
# Counts are halved beyond this number of observations, because acceptance changes with the text.
_MAX_OBSERVATIONS = 400.0


class AcceptanceRate:
    """Acceptance rate of a class of nodes, given that their parent was accepted."""

    def __init__(self) -> None:
        self.seen = _PRIOR_WEIGHT
        self.accepted = _PRIOR * _PRIOR_WEIGHT

    def add(self, accepted: bool) -> None:
        """Count a verified node whose parent was accepted."""
        if self.seen > _MAX_OBSERVATIONS:
            self.seen *= 0.5
            self.accepted *= 0.5
        self.seen += 1
        self.accepted += accepted

    @property
    def share(self) -> float:
        """The rate, between 0 and 1."""
        return self.accepted / self.seen


class AcceptanceEstimate:
    """Acceptance rates of all classes of nodes."""

    def __init__(self) -> None:
        self._rates: dict[Hashable, AcceptanceRate] = {}

    def observe(self, outcome: Outcome) -> None:
        """Count every node whose parent was accepted, up to the end of the sequence."""
        tree = outcome.tree
        for parent in outcome.decided:
            for child in tree.children.get(parent, ()):
                self._rate(tree.label(child)).add(child in outcome.path)

    def probabilities(self, tree: DraftTree) -> list[float]:
        """Probability that each node is accepted, together with all nodes above it."""
        probabilities: list[float] = []
        for node, parent in enumerate(tree.parents):
            parent_probability = 1.0 if parent == ROOT else probabilities[parent]
            probabilities.append(parent_probability * self._rate(tree.label(node)).share)
        return probabilities

    def _rate(self, label: Hashable) -> AcceptanceRate:
        rate = self._rates.get(label)
        if rate is None:
            rate = self._rates[label] = AcceptanceRate()
        return rate


def prior_probability(rank: int) -> float:
    """Prior probability that the node with this index in a draft is accepted, before any draft was verified."""
    return _PRIOR ** (rank / 2 + 1)


def expected_rate(costs: PassCosts, max_nodes: int, sequences: int = 1) -> float:
    """Expected tokens per second with the best draft size up to max_nodes, under the prior acceptance."""
    rates, expected = [], 1.0
    for nodes in range(max_nodes + 1):
        expected += prior_probability(nodes - 1) if nodes else 0.0
        rates.append(expected * sequences / costs.seconds(1 + nodes, sequences))
    return max(rates)
