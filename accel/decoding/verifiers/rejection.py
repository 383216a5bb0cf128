"""Shared parts of rejection samplers: the walk down a tree, the order of a node's draws, the residual distribution.

Distributions are float64 NumPy arrays on the host. float64, because in float32 the small differences that a recovered
token is drawn from are rounding errors. NumPy, because a node takes a dozen small operations, each of which costs a
third of torch's; on a GPU, every decision would wait for the device, while this takes one copy a node.
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
    """Accept children from the root on as long as one is accepted; then draw the token after the last one.

    choose: its arguments are a node with children, the target's distribution (V,) after it, the node's children, once
    for each draw, and as many uniform numbers from [0, 1). It returns the accepted child and the target's distribution,
    or None and the distribution of the recovered token. At temperature 0, `choose` is not called: the child with the
    most probable token is accepted.
    """
    if rows.is_greedy:
        return descend(tree, rows.best)
    path: list[int] = []
    node = ROOT
    while True:
        target = distribution(rows.probs(node))
        draws = draws_of(tree, node, generator)
        *points, last = _uniform_numbers(len(draws) + 1, generator)
        child, target = choose(node, target, draws, points) if draws else (None, target)
        if child is None:
            return Verdict(path, _inverse_cdf(target, last))
        path.append(child)
        node = child


def distribution(probs: Tensor) -> Array:
    """A distribution (V,) that sums to one, which that of a float32 softmax does only approximately."""
    normalised: Array = probs.numpy(force=True).astype(np.float64)
    normalised /= normalised.sum()
    return normalised


def draft_distribution(tree: DraftTree, node: int, child: int, vocabulary: int) -> Array:
    """Distribution (V,) that the first child of a node was drawn from; for deterministic drafts one-hot at `child`."""
    if tree.draft_sampling is DraftSampling.DETERMINISTIC:
        one_hot = np.zeros(vocabulary)
        one_hot[tree.tokens[child]] = 1
        return one_hot
    assert tree.draft_probs is not None
    return distribution(tree.draft_probs[node])


def draws_of(tree: DraftTree, node: int, generator: torch.Generator) -> list[int]:
    """Children of a node, once for every draw, in a random order of the draws.

    A tree merges repeated draws and so loses their order; all orders are equally likely. To take all draws of one token
    before those of the next would be biased: repetitions would be more likely than they are.
    """
    children, counts = tree.children.get(node, []), tree.counts
    if counts is None or tree.draft_sampling is not DraftSampling.INDEPENDENT:
        return children
    draws = [child for child in children for _ in range(counts[child])]
    if len(draws) == len(children) or len(children) == 1:
        return draws
    order: list[int] = torch.randperm(len(draws), generator=generator, device=generator.device).tolist()
    return [draws[index] for index in order]


def recovered(target: Array, draft: Array) -> Array:
    """Residual distribution (V,) after a draw from draft (V,) was rejected: norm(max(0, target - draft))."""
    residual = np.maximum(target - draft, 0)
    total = residual.sum()
    # The residual is zero if both are equal up to rounding; then the rejection itself was a rounding error.
    return residual / total if total > 0 else target


def _uniform_numbers(count: int, generator: torch.Generator) -> list[float]:
    points: list[float] = torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device).tolist()
    return points


def _inverse_cdf(probs: Array, point: float) -> int:
    """The id at which the cumulative distribution exceeds the point."""
    cumulative = probs.cumsum()
    return min(int(cumulative.searchsorted(point * cumulative[-1], side="right")), len(probs) - 1)
