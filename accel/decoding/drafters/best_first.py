"""Best-first trees: of all nodes the most probable ones, by a model that gives the successors of a path's last tokens.

Source: DySpec, Xiong et al. 2024, arXiv:2410.11744, with a table in place of its draft model.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from hasten.accel.decoding.tree import ROOT

Tail = tuple[int, ...]


class BestFirst(NamedTuple):
    """Nodes, most probable first. tokens, parents: as in DraftTree. probs: given the parent. ranks: among siblings."""

    tokens: list[int]
    parents: list[int]
    probs: list[float]
    ranks: list[int]
    depths: list[int]


def best_first(
    tail: Tail,
    successors: Callable[[Tail], Sequence[tuple[int, float]]],
    budget: int,
    max_depth: int,
    min_probability: float = 0.0,
) -> BestFirst:
    """The at most `budget` nodes with the largest product of probabilities along their path, min_probability at least.

    tail: the last tokens of the sequence. successors: tokens and probabilities after the last tokens of a path, which
    are as many, most probable first; empty if there are none.
    """
    nodes = BestFirst([], [], [], [], [])
    # An entry also represents its later siblings, which are at most as likely:
    # (-value, age, parent's value, successors, rank, parent, its tail, depth).
    heap: list[tuple[float, int, float, Sequence[tuple[int, float]], int, int, Tail, int]] = []

    def put(value: float, parent: int, depth: int, tail: Tail, row: Sequence[tuple[int, float]], rank: int) -> None:
        path_value = value * row[rank][1]
        if path_value >= min_probability:
            heappush(heap, (-path_value, len(nodes.tokens), value, row, rank, parent, tail, depth))

    row = successors(tail)
    if row:
        put(1.0, ROOT, 1, tail, row, 0)
    while heap and len(nodes.tokens) < budget:
        value, _, above, row, rank, parent, tail, depth = heappop(heap)
        token, prob = row[rank]
        node = len(nodes.tokens)
        nodes.tokens.append(token)
        nodes.parents.append(parent)
        nodes.probs.append(prob)
        nodes.ranks.append(rank)
        nodes.depths.append(depth)
        if rank + 1 < len(row):
            put(above, parent, depth, tail, row, rank + 1)
        if depth < max_depth:
            below = (*tail[1:], token)
            row = successors(below)
            if row:
                put(-value, node, depth + 1, below, row, 0)
    return nodes
