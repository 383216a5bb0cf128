"""RSD-S: the draft model's tree is a stochastic beam search, which draws whole continuations without replacement.

Source: Jeon et al. 2024, arXiv:2402.14160 (recursive speculative decoding, stochastic beam search); Kool et al. 2019,
arXiv:1903.06059.
Departs from it: the children of a node come in falling order of their perturbed value, as they arrive in a race of
exponential clocks that the node's own value starts. This is the distribution of Gumbel noise for every token, truncated
at the parent's value, at one number for each child that comes up. Where the budget is smaller than the tree, the
deepest level that is begun has a narrower beam.
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
from hasten.accel.decoding.drafters.without_replacement import drawn, ranked
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class _Node:
    """perturbed: log probability of the path plus its noise; the log probability itself where nothing is drawn."""

    index: int
    log_prob: float
    perturbed: float


@dataclass(frozen=True)
class RSDBeam(SmallModelDrafter):
    """Drafter of a beam of `width` nodes at each of `length` depths; a plain beam search at temperature 0."""

    width: int = 3
    length: int = 4

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("length", self.length)):
            if value < 1:
                raise UserError(f"{name}={value} must be 1 or more")

    def draft_sampling(self, sampling: Sampling) -> DraftSampling:
        """Without replacement, unless there is nothing to draw."""
        return DraftSampling.DETERMINISTIC if sampling.is_greedy else DraftSampling.WITHOUT_REPLACEMENT

    def chains(self) -> bool:
        """Only where the beam is one node wide."""
        return self.width == 1

    def grow(self, context: Context, memory: SmallModel, budget: int, logits: Tensor) -> Growth:
        """All that the beam ever held, level by level, in falling order of perturbed values: siblings as drawn."""
        tree = GrowingTree(context, memory, logits)
        beam = [_Node(ROOT, 0.0, 0.0)]
        for _ in range(self.length):
            width = min(self.width, budget - len(tree))
            if not width:
                break
            yield from tree.show([node.index for node in beam])
            below = [
                _ranked(node, tree.probs[node.index], width)
                if context.sampling.is_greedy
                else _perturbed(node, tree.probs[node.index], context.draft_generator)
                for node in beam
            ]
            heads = heapq.merge(*(_of(node, each) for node, each in zip(beam, below, strict=True)))
            beam = [
                _Node(tree.add(parent, token), log_prob, -negative)
                for negative, parent, token, log_prob in islice(heads, width)
            ]
        return tree.done(self.draft_sampling(context.sampling))


def _of(node: _Node, children: Iterator[tuple[float, float, int]]) -> Iterator[tuple[float, int, int, float]]:
    return ((-perturbed, node.index, token, log_prob) for perturbed, log_prob, token in children)


def _ranked(node: _Node, probs: Tensor, width: int) -> Iterator[tuple[float, float, int]]:
    """(log probability, twice, token) of a node's most probable children."""
    for candidate in ranked(probs, width):
        log_prob = node.log_prob + math.log(candidate.share)
        yield log_prob, log_prob, candidate.token


def _perturbed(node: _Node, probs: Tensor, generator: torch.Generator) -> Iterator[tuple[float, float, int]]:
    """(perturbed value, log probability, token) of a node's children, the largest value first: the node's own.

    exp(-value) is when a clock of rate exp(log probability) rings; the next child rings after the one before at the
    rate of all that are left. Logarithms throughout, as both underflow in a deep tree.
    """
    rings = -node.perturbed
    for count, candidate in enumerate(drawn(probs, generator)):
        if count:
            waited = torch.empty((), dtype=torch.float64).exponential_(generator=generator).log()
            after = float(waited) - node.log_prob - math.log(candidate.left)
            rings = max(rings, after) + math.log1p(math.exp(-abs(rings - after)))
        yield -rings, node.log_prob + math.log(candidate.share), candidate.token
