"""Best-first trees have the most probable nodes, worked out by listing all paths."""

import random
from itertools import product
from math import prod

import pytest

from hasten.accel.decoding.drafters.best_first import best_first
from hasten.accel.decoding.tree import DraftTree


@pytest.mark.parametrize("seed", range(5))
def test_the_nodes_are_those_with_the_largest_product_of_probabilities(seed):
    dice = random.Random(seed)
    rows = {}
    for token in range(4):
        probs = sorted((dice.random() for _ in range(4)), reverse=True)
        rows[token] = [(other, prob / sum(probs)) for other, prob in zip(dice.sample(range(4), 4), probs, strict=True)]

    def value(path):
        return prod(dict(rows[before])[token] for before, token in zip((0, *path), path, strict=False))

    nodes = best_first((0,), lambda tail: rows[tail[-1]], 12, max_depth=3)
    tree = DraftTree(nodes.tokens, nodes.parents)
    found = [tuple(tree.tokens[above] for above in tree.path(node)) for node in range(len(tree))]
    paths = [path for depth in (1, 2, 3) for path in product(range(4), repeat=depth)]
    assert found == sorted(paths, key=value, reverse=True)[:12]
    assert nodes.depths == tree.depths
    assert [prod(nodes.probs[above] for above in tree.path(node)) for node in range(12)] == pytest.approx(
        [value(path) for path in found]
    )
