from collections import Counter
from itertools import permutations, product

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.drafters.model.rsd_beam import RSDBeam
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.decoding.verifiers.recursive_rejection import RecursiveRejection
from hasten.accel.errors import UserError
from tests.decoding.markov import MarkovTarget, decoded, grown, is_drawn_from, pairs, random_table

WARM = Sampling(temperature=1.0)


def memory(vocabulary=3, order=1):
    return SmallModel(MarkovTarget(random_table(vocabulary, order)))


def sequences(table, length):
    """Probability of every continuation of 0."""
    q = table.softmax(-1).double()
    found = {}
    for path in product(range(len(q)), repeat=length):
        share = 1.0
        for before, token in zip((0, *path), path, strict=False):
            share *= float(q[before, token])
        found[path] = share
    return found


def leaves(tree, length):
    """Whole continuations, in falling order of perturbed value."""
    paths = [tree.path(node) for node in range(len(tree)) if tree.depths[node] == length]
    return [tuple(tree.tokens[node] for node in path) for path in paths]


def test_whole_continuations_are_drawn_in_order_without_replacement():
    draft, context = memory(), Context.start([0], WARM)
    counts = Counter(tuple(leaves(grown(RSDBeam(width=2, length=2), draft, context, 9), 2)) for _ in range(1500))
    p = sequences(draft.target.table, 2)
    expected = {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in permutations(p, 2)}
    assert is_drawn_from(counts, expected)


def test_the_best_leaf_of_a_deep_tree_is_a_draw_of_the_draft_model():
    draft, context = memory(vocabulary=2), Context.start([0], WARM)
    counts = Counter(leaves(grown(RSDBeam(width=3, length=3), draft, context, 99), 3)[0] for _ in range(1500))
    assert is_drawn_from(counts, sequences(draft.target.table, 3))


def test_siblings_are_drawn_in_order_without_replacement():
    draft, context = memory(vocabulary=4), Context.start([0], WARM)
    counts = Counter(tuple(grown(RSDBeam(width=2, length=1), draft, context, 9).tokens) for _ in range(1500))
    q = draft.target.table[0].softmax(-1).tolist()
    assert is_drawn_from(counts, {(a, b): q[a] * q[b] / (1 - q[a]) for a, b in permutations(range(4), 2)})


def test_what_is_verified_recursively_follows_the_target():
    draft, context, target = memory(vocabulary=4), Context.start([0], WARM), random_table(4, seed=1)
    counts = decoded(RSDBeam(width=3, length=2), RecursiveRejection(), draft, context, target, 5, 1500)
    assert is_drawn_from(counts, pairs(target, 0))


def test_the_tree_holds_all_that_was_in_the_beam_level_by_level():
    draft = memory(vocabulary=6, order=2)
    tree = RSDBeam(width=3, length=4).propose(Context.start([1, 2], WARM), draft, 99)
    assert tree.draft_sampling is DraftSampling.WITHOUT_REPLACEMENT
    assert tree.depths == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert [width for _, width in draft.target.passes] == [2, 3, 3, 3]
    for node, probs in tree.draft_probs.items():
        before, last = [1, 2, *(tree.tokens[each] for each in tree.path(node))][-2:]
        assert torch.equal(probs, draft.target.table[before, last].softmax(-1))


def test_a_smaller_budget_ends_in_a_narrower_beam():
    tree = RSDBeam(width=3, length=4).propose(Context.start([0], WARM), memory(vocabulary=6), 8)
    assert tree.depths == [1] * 3 + [2] * 3 + [3] * 2


def test_a_deep_tree_of_certain_and_impossible_tokens_is_drawn():
    table = torch.full((4, 4), -torch.inf)
    table[:, 1], table[:, 2] = 0.0, -80.0  # probabilities of 1 and 1e-35
    context = Context.start([0], WARM)
    tree = grown(RSDBeam(width=2, length=40), SmallModel(MarkovTarget(table)), context, 99)
    assert leaves(tree, 40)[0] == (1,) * 40


def test_at_temperature_0_it_is_a_beam_search():
    draft = memory(vocabulary=5)
    tree = RSDBeam(width=3, length=2).propose(Context.start([0]), draft, 99)
    q = draft.target.table.softmax(-1)
    beam = q[0].topk(3).indices.tolist()
    assert tree.tokens[:3] == beam
    below = {(a, b): float(q[0, a] * q[a, b]) for a in beam for b in range(5)}
    assert leaves(tree, 2) == sorted(below, key=below.__getitem__, reverse=True)[:3]
    assert (tree.draft_sampling, tree.draft_probs) == (DraftSampling.DETERMINISTIC, None)
    assert tree.parents[:3] == [ROOT] * 3


@pytest.mark.parametrize("name", ["width", "length"])
def test_none_is_refused(name):
    with pytest.raises(UserError, match=f"{name}=0 must be 1 or more"):
        RSDBeam(**{name: 0})
