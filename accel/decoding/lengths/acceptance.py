"""Estimates of the acceptance of drafted tokens, by class of node (`DraftTree.labels`), from verified drafts."""

from collections.abc import Hashable, Sequence

from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import ROOT, DraftTree

# Prior acceptance of a node whose parent is accepted, by its rank among its siblings; the last one is that of all later
# ranks. It counts as so many observations. Ranks have estimates of their own, which are the priors of classes.
_RANKS, _PRIOR_WEIGHT = (0.5, 0.1, 0.05, 0.03), 2.0
# Number of proposals for a sequence that are compared with its text at the same time.
_MAX_FOLLOWED = 8
# Counts are halved beyond this number of observations, because acceptance changes with the text.
_MAX_OBSERVATIONS = 400.0


class AcceptanceRate:
    """Acceptance rate of some nodes, given that their parent was accepted. prior: the rate before any observation."""

    def __init__(self, prior: float) -> None:
        self.seen = _PRIOR_WEIGHT
        self.accepted = prior * _PRIOR_WEIGHT

    def add(self, accepted: bool) -> None:
        """Count a node whose parent was accepted."""
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
    """Acceptance rates of all classes of nodes, and of all ranks among siblings, at the first depth and below."""

    def __init__(self) -> None:
        self._rates: dict[Hashable, AcceptanceRate] = {}
        self._ranks = [[AcceptanceRate(prior) for prior in _RANKS] for _ in range(2)]

    def observe(self, outcome: Outcome) -> None:
        """Count every proposed node whose parent is in the committed text, up to the end of the sequence.

        Nodes that were not verified count, too: the text shows whether the target agrees with them. A proposal is
        followed through later passes until the text leaves it.
        """
        followed: list[tuple[DraftTree, int]] = outcome.context.state.pop(self, [])
        if len(outcome.tree.proposed):
            followed.append((outcome.tree.proposed, ROOT))
        reached = [(tree, self._follow(tree, node, outcome.committed)) for tree, node in followed[-_MAX_FOLLOWED:]]
        if any(node is not None for _, node in reached):
            outcome.context.state[self] = [(tree, node) for tree, node in reached if node is not None]

    def _follow(self, tree: DraftTree, node: int, tokens: Sequence[int]) -> int | None:
        """Count the children of a node and of those that the tokens lead to; the last node, None if they leave it."""
        for token in tokens:
            children = tree.children.get(node)
            if children is None:
                return None
            below = None
            for rank, child in enumerate(children):
                agrees = tree.tokens[child] == token
                if agrees:
                    below = child
                self._rate(tree, child, rank).add(agrees)
                self._of_rank(tree, child, rank).add(agrees)
            if below is None:
                return None
            node = below
        return node

    def probabilities(self, tree: DraftTree) -> list[float]:
        """Probability that each node is accepted, together with all nodes above it."""
        probabilities: list[float] = []
        siblings: dict[int, int] = {}
        for node, parent in enumerate(tree.parents):
            rank = siblings[parent] = siblings.get(parent, -1) + 1
            above = 1.0 if parent == ROOT else probabilities[parent]
            probabilities.append(above * self._rate(tree, node, rank).share)
        return probabilities

    def _rate(self, tree: DraftTree, node: int, rank: int) -> AcceptanceRate:
        label = tree.label(node)
        rate = self._rates.get(label)
        if rate is None:
            rate = self._rates[label] = AcceptanceRate(self._of_rank(tree, node, rank).share)
        return rate

    def _of_rank(self, tree: DraftTree, node: int, rank: int) -> AcceptanceRate:
        return self._ranks[tree.parents[node] != ROOT][min(rank, len(_RANKS) - 1)]


def prior_probability(rank: int) -> float:
    """Prior probability that the node with this index in a draft is accepted, before any draft was verified."""
    return 0.5 ** (rank / 2 + 1)


def expected_rate(costs: PassCosts, max_nodes: int, sequences: int = 1) -> float:
    """Expected tokens per second with the best draft size up to max_nodes, under the prior acceptance."""
    rates, expected = [], 1.0
    for nodes in range(max_nodes + 1):
        expected += prior_probability(nodes - 1) if nodes else 0.0
        rates.append(expected * sequences / costs.seconds(1 + nodes, sequences))
    return max(rates)
