from collections import Counter

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.drafters.model.spectr import SpecTr
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.decoding.verifiers.k_sequential import KSequential
from hasten.accel.decoding.verifiers.recursive_rejection import RecursiveRejection
from hasten.accel.errors import UserError
from tests.decoding.markov import MarkovTarget, decoded, grown, is_drawn_from, pairs, random_table

WARM = Sampling(temperature=1.0)


def memory(vocabulary=3, order=1):
    return SmallModel(MarkovTarget(random_table(vocabulary, order)))


def test_the_first_tokens_of_two_paths_are_independent_draws():
    draft, context = memory(), Context.start([0], WARM)
    counts = Counter()
    for _ in range(3000):
        tree = grown(SpecTr(paths=2, length=1), draft, context, 8)
        drawn = [token for token, count in zip(tree.tokens, tree.counts, strict=True) for _ in range(count)]
        counts[tuple(drawn)] += 1
    q = draft.target.table[0].softmax(-1).tolist()
    assert is_drawn_from(counts, {(a, b): q[a] * q[b] for a in range(3) for b in range(3)})


@pytest.mark.parametrize("verifier", [KSequential(), RecursiveRejection()])
def test_what_is_verified_follows_the_target(verifier):
    draft, context, target = memory(vocabulary=4), Context.start([0], WARM), random_table(4, seed=1)
    # A budget that stops some of the paths.
    counts = decoded(SpecTr(paths=4, length=2), verifier, draft, context, target, 5, 1200)
    assert is_drawn_from(counts, pairs(target, 0))


def test_paths_share_nodes_that_count_how_often_they_were_drawn():
    draft, context = memory(order=2), Context.start([1, 2], WARM)
    for _ in range(20):
        tree = SpecTr(paths=5, length=3).propose(context, draft, 99)
        assert tree.draft_sampling is DraftSampling.INDEPENDENT
        for parent, children in tree.children.items():
            assert len({tree.tokens[child] for child in children}) == len(children)
            # As all paths have the same length, all that come to a node go on.
            above = 5 if parent == ROOT else tree.counts[parent]
            assert sum(tree.counts[child] for child in children) == above
        assert max(tree.depths) == min(tree.depths[node] for node in range(len(tree)) if node not in tree.children) == 3


def test_distributions_are_those_after_the_path():
    draft, context = memory(order=2), Context.start([1, 2], WARM)
    tree = SpecTr(paths=3, length=3).propose(context, draft, 99)
    assert set(tree.draft_probs) == set(tree.children)
    for node, probs in tree.draft_probs.items():
        before, last = [1, 2, *(tree.tokens[each] for each in tree.path(node))][-2:]
        assert torch.equal(probs, draft.target.table[before, last].softmax(-1))


def test_a_level_takes_one_pass():
    draft = memory(order=2)
    tree = SpecTr(paths=4, length=3).propose(Context.start([1, 2], WARM), draft, 99)
    assert [width for _, width in draft.target.passes] == [2, tree.depths.count(1), tree.depths.count(2)]


@pytest.mark.parametrize("budget", [1, 3, 5, 8, 11])
def test_which_paths_go_on_is_settled_before_the_draw(budget):
    draft, context = memory(vocabulary=4), Context.start([0], WARM)
    for _ in range(50):
        tree = grown(SpecTr(paths=4, length=4), draft, context, budget)
        assert len(tree) <= budget
        before = 0
        for depth in range(1, max(tree.depths) + 1):
            level = [node for node in range(len(tree)) if tree.depths[node] == depth]
            # All four, or as many as the budget had room for had no two of them been the same.
            assert sum(tree.counts[node] for node in level) == min(4, budget - before)
            before += len(level)


def test_at_temperature_0_it_is_a_chain():
    tree = SpecTr(paths=4, length=3).propose(Context.start([1, 2]), memory(order=2), 16)
    assert tree.is_chain
    assert (len(tree), tree.draft_sampling, tree.draft_probs, tree.counts) == (
        3,
        DraftSampling.DETERMINISTIC,
        None,
        None,
    )
    assert SpecTr().draft_sampling(Sampling()) is DraftSampling.DETERMINISTIC


@pytest.mark.parametrize("name", ["paths", "length"])
def test_none_is_refused(name):
    with pytest.raises(UserError, match=f"{name}=0 must be 1 or more"):
        SpecTr(**{name: 0})
