"""RSD-S: the tree is a stochastic beam search of the draft model, which draws whole paths without replacement.

Source: Jeon et al. 2024, arXiv:2402.14160 (recursive speculative decoding, stochastic beam search); Kool et al. 2019,
arXiv:1903.06059.
Departs from it: the children of a node are drawn in descending order of their perturbed value, as arrivals in a race of
exponential clocks that starts at the node's own value. They have the distribution of Gumbel noise for every token,
truncated at the parent's value, but take one random number a child. If the budget is smaller than the tree, the last
level has a narrower beam.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import GrowingTree, Growth, SmallModel, SmallModelDrafter
from hasten.accel.decoding.drafters.without_replacement import draw_distinct, ranked
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class _Node:
    """perturbed: log probability of the path plus its Gumbel noise; without noise at temperature 0."""

    index: int
    log_prob: float
    perturbed: float


@dataclass(frozen=True)
class RSDBeam(SmallModelDrafter):
    """Drafter whose beam has `width` nodes at each of `length` depths; at temperature 0 an ordinary beam search."""

    width: int = 3
    length: int = 4

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("length", self.length)):
            if value < 1:
                raise UserError(f"{name}={value} must be 1 or more")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Draws without replacement; deterministic at temperature 0."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def chains(self) -> bool:
        """Whether the beam is one node wide."""
        return self.width == 1

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """All nodes of the beam, level by level, in descending order of perturbed values, so siblings as drawn."""
        tree = GrowingTree(context, memory, logits)
        beam = [_Node(ROOT, 0.0, 0.0)]
        for _ in range(self.length):
            width = min(self.width, budget - len(tree))
            if not width:
                break
            yield from tree.evaluate([node.index for node in beam])
            below = [
                _ranked(node, tree.probs[node.index], width)
                if context.drafting.is_greedy
                else _perturbed(node, tree.probs[node.index], context.draft_generator)
                for node in beam
            ]
            best = heapq.merge(*(_heap_entries(node, children) for node, children in zip(beam, below, strict=True)))
            beam = [
                _Node(tree.add(parent, token), log_prob, -negative)
                for negative, parent, token, log_prob in islice(best, width)
            ]
        return tree.done(self.draft_sampling(context.drafting))


def _heap_entries(node: _Node, children: Iterator[tuple[float, float, int]]) -> Iterator[tuple[float, int, int, float]]:
    """(-perturbed value, parent, token, log probability) of a node's children, for heapq.merge."""
    return ((-perturbed, node.index, token, log_prob) for perturbed, log_prob, token in children)


def _ranked(node: _Node, probs: Tensor, width: int) -> Iterator[tuple[float, float, int]]:
    """(log probability, log probability, token) of a node's `width` most probable children."""
    for candidate in ranked(probs, width):
        log_prob = node.log_prob + math.log(candidate.prob)
        yield log_prob, log_prob, candidate.token


def _perturbed(node: _Node, probs: Tensor, generator: torch.Generator) -> Iterator[tuple[float, float, int]]:
    """(perturbed value, log probability, token) of a node's children, largest value first.

    The first child has the node's own value. exp(-value) is the arrival time of a clock with rate exp(log probability);
    the time between two children has the rate of all children that remain. Everything is in logarithms, because times
    and rates underflow in a deep tree.
    """
    log_time = -node.perturbed
    for count, candidate in enumerate(draw_distinct(probs, generator)):
        if count:
            exponential = torch.empty((), dtype=torch.float64).exponential_(generator=generator).log()
            log_gap = float(exponential) - node.log_prob - math.log(candidate.remaining)
            log_time = max(log_time, log_gap) + math.log1p(math.exp(-abs(log_time - log_gap)))
        yield -log_time, node.log_prob + math.log(candidate.prob), candidate.token
