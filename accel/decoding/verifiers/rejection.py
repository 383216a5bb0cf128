"""What verifiers that reject draws share: the walk down a draft, the draws below a node, what is left after rejecting.

Distributions are float64 in NumPy, on the host. float64: in float32 the small differences that a recovered token is
drawn from are rounding. NumPy: the arithmetic is a dozen small steps a node, of which each costs a third of torch's,
and on a GPU every decision would wait for the device; so it is one copy a node.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.base import TargetRows, Verdict, descend

Array = NDArray[np.float64]


def walk(
    tree: DraftTree,
    rows: TargetRows,
    generator: torch.Generator,
    choose: Callable[[int, Array, list[int], list[float]], tuple[int | None, Array]],
) -> Verdict:
    """Walk down while a child is accepted; then draw the token after it.

    choose: given a node with children, the target's distribution (V,) after it, the node's children, one for each draw,
    and as many numbers from [0, 1), it returns the accepted child, or None and the distribution of the recovered token.
    At temperature 0 the most probable token is the one that is accepted, whatever the draft.
    """
    if rows.is_greedy:
        return descend(tree, rows.best)
    path: list[int] = []
    node = ROOT
    while True:
        target = distribution(rows.probs(node))
        draws = drawn(tree, node, generator)
        *points, last = _points(len(draws) + 1, generator)
        child, target = choose(node, target, draws, points) if draws else (None, target)
        if child is None:
            return Verdict(path, _inverse(target, last))
        path.append(child)
        node = child


def distribution(probs: Tensor) -> Array:
    """A distribution (V,) that adds up to one, whatever a softmax in float32 left."""
    found: Array = probs.numpy(force=True).astype(np.float64)
    found /= found.sum()
    return found


def draft_distribution(tree: DraftTree, node: int, child: int, vocabulary: int) -> Array:
    """Distribution (V,) that the first child of a node was drawn from; one-hot at a child that was not drawn."""
    if tree.draft_sampling is DraftSampling.DETERMINISTIC:
        found = np.zeros(vocabulary)
        found[tree.tokens[child]] = 1
        return found
    assert tree.draft_probs is not None
    return distribution(tree.draft_probs[node])


def drawn(tree: DraftTree, node: int, generator: torch.Generator) -> list[int]:
    """Children of a node, one for every draw, in an order that could be theirs.

    Merging repeated draws forgets in which order they came, and every arrangement is as likely as another. To take all
    draws of one token before the next would be biased: it would make repetitions more likely than they are.
    """
    children, counts = tree.children.get(node, []), tree.counts
    if counts is None or tree.draft_sampling is not DraftSampling.INDEPENDENT:
        return children
    each = [child for child in children for _ in range(counts[child])]
    if len(each) == len(children) or len(children) == 1:
        return each
    order: list[int] = torch.randperm(len(each), generator=generator, device=generator.device).tolist()
    return [each[index] for index in order]


def recovered(target: Array, draft: Array) -> Array:
    """What is left of the target (V,) after a draw from draft (V,) was rejected: norm(max(0, target - draft))."""
    left = np.maximum(target - draft, 0)
    total = left.sum()
    # Where both are the same but for rounding nothing is left, and nothing should have been rejected.
    return left / total if total > 0 else target


def _points(count: int, generator: torch.Generator) -> list[float]:
    found: list[float] = torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device).tolist()
    return found


def _inverse(probs: Array, point: float) -> int:
    """The id at which the cumulative distribution passes the point."""
    cumulative = probs.cumsum()
    return min(int(cumulative.searchsorted(point * cumulative[-1], side="right")), len(probs) - 1)
