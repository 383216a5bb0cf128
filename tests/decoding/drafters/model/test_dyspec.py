import heapq
from collections import Counter
from itertools import count

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model import dyspec
from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.drafters.model.dyspec import DySpec
from hasten.accel.decoding.drafters.without_replacement import draw_distinct
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.decoding.verifiers.recursive_rejection import RecursiveRejection
from hasten.accel.errors import UserError
from tests.decoding.markov import MarkovTarget, decoded, grown, is_drawn_from, pairs, random_table

WARM = Sampling(temperature=1.0)
# After 0 come 1, 2 and 3, after 1 mostly 2, after 2 or 3 mostly 1.
Q = torch.tensor([[0.0, 0.5, 0.3, 0.2], [0.1, 0.1, 0.8, 0.0], [0.1, 0.6, 0.2, 0.1], [0.0, 0.9, 0.1, 0.0]])


def memory(table):
    return SmallModel(MarkovTarget(table))


def by_hand(budget, numbers):
    """The heap of the paper over Q from 0; numbers: for every node how its children are drawn, as (token, …)."""
    tokens, parents = [], []
    serial = count()
    heap = [(-1.0, next(serial), Q[0].double(), ROOT, 0)]
    while heap and len(tokens) < budget:
        v, _, rest, parent, rank = heapq.heappop(heap)
        token = numbers(parent, rank, tokens, parents)
        if token is None:
            continue
        share = float(rest[token])
        node = len(tokens)
        tokens.append(token)
        parents.append(parent)
        below = rest.clone()
        below[token] = 0
        if share < 1 - 1e-12:
            heapq.heappush(heap, (v * (1 - share), next(serial), below / below.sum(), parent, rank + 1))
        heapq.heappush(heap, (v * share, next(serial), Q[token].double(), node, 0))
    return tokens, parents


def sequence_of(token_path, seed):
    """Children of a node in the order in which a generator of its own draws them."""
    generator = torch.Generator().manual_seed(hash((seed, token_path[-1])) % 2**31)
    return [taken.token for taken in draw_distinct(Q[token_path[-1]], generator)]


@pytest.mark.parametrize("budget", [1, 2, 5, 9, 16])
def test_the_tree_is_the_one_of_the_papers_heap(budget, monkeypatch):
    for seed in range(40):

        def from_own_generator(probs, generator, seed=seed):
            token = int((Q - probs).abs().sum(-1).argmin())
            return draw_distinct(probs, torch.Generator().manual_seed(hash((seed, token)) % 2**31))

        def next_token(parent, rank, tokens, parents, seed=seed):
            path = [0, *(tokens[node] for node in DraftTree(tokens, parents).path(parent))]
            found = sequence_of(path, seed)
            return found[rank] if rank < len(found) else None

        monkeypatch.setattr(dyspec, "draw_distinct", from_own_generator)
        tree = grown(DySpec(), memory(Q.log()), Context.start([0], WARM), budget)
        tokens, parents = by_hand(budget, next_token)
        paths = [
            tuple(each.tokens[step] for step in each.path(node))
            for each in (tree, DraftTree(tokens, parents))
            for node in range(len(each))
        ]
        # Equal estimates may stand in either order.
        assert sorted(paths[: len(tree)]) == sorted(paths[len(tree) :])
        assert len(tree) == budget


def test_at_temperature_0_the_most_probable_paths_come_first():
    tree = DySpec().propose(Context.start([0]), memory(Q.log()), 7)
    # 1: 0.5, 1 2: 0.4, 2: 0.3, 1 2 1: 0.24, 3: 0.2, 1 2 1 2: 0.192, 2 1 and 3 1: 0.18.
    assert tree.tokens[:6] == [1, 2, 2, 1, 3, 2]
    assert tree.parents[:6] == [ROOT, 0, ROOT, 1, ROOT, 3]
    assert (tree.tokens[6], tree.parents[6]) in {(1, 2), (1, 4)}
    assert (tree.draft_sampling, tree.draft_probs) == (DraftSampling.DETERMINISTIC, None)


def test_the_first_nodes_are_the_tree_of_a_smaller_budget():
    draft = memory(random_table(12, order=2, scale=2.0))
    full = DySpec().propose(Context.start([1, 2]), draft, 24)
    for budget in (1, 5, 16):
        assert DySpec().propose(Context.start([1, 2]), draft, budget) == full.first(budget)


def test_a_threshold_leaves_slots_below_it_out():
    tree = DySpec(threshold=0.25).propose(Context.start([0]), memory(Q.log()), 99)
    assert (tree.tokens, tree.parents) == ([1, 2, 2], [ROOT, 0, ROOT])
    assert len(DySpec(threshold=0.6).propose(Context.start([0]), memory(Q.log()), 99)) == 0
    # A drawn tree always has a first token, whose slot is reached for sure.
    assert len(DySpec(threshold=0.99).propose(Context.start([0], WARM), memory(Q.log()), 99)) >= 1


def test_a_level_takes_one_pass():
    draft = memory(random_table(12, order=2, scale=2.0))
    tree = DySpec().propose(Context.start([1, 2]), draft, 16)
    assert len(draft.target.passes) <= max(tree.depths) + 1 < len(tree)


def test_distributions_are_those_after_the_path():
    draft, context = memory(random_table(8, order=2, scale=2.0)), Context.start([1, 2], WARM)
    tree = DySpec().propose(context, draft, 16)
    assert tree.draft_sampling is DraftSampling.WITHOUT_REPLACEMENT
    assert set(tree.draft_probs) == set(tree.children)
    for node, probs in tree.draft_probs.items():
        before, last = [1, 2, *(tree.tokens[each] for each in tree.path(node))][-2:]
        assert torch.equal(probs, draft.target.table[before, last].softmax(-1))


def test_siblings_are_drawn_in_order_without_replacement():
    draft, context = memory(Q.log()), Context.start([0], WARM)
    counts = Counter()
    for _ in range(2000):
        tree = grown(DySpec(), draft, context, 4)
        counts[tuple(tree.tokens[child] for child in tree.children[ROOT])] += 1
    q = Q[0].tolist()
    firsts = {token: sum(each for tokens, each in counts.items() if tokens[0] == token) for token in (1, 2, 3)}
    assert is_drawn_from(firsts, {token: q[token] for token in (1, 2, 3)})
    # Whether there is a second child depends on the first, but not on what the second would be.
    for first in (1, 2, 3):
        assert sum(each for tokens, each in counts.items() if tokens[0] == first) == pytest.approx(
            2000 * q[first], abs=150
        )
        seconds = Counter()
        for tokens, each in counts.items():
            if tokens[0] == first and len(tokens) > 1:
                seconds[tokens[1]] += each
        if seconds:
            left = {token: q[token] / (1 - q[first]) for token in (1, 2, 3) if token != first}
            assert is_drawn_from(seconds, left)


def test_what_is_verified_recursively_follows_the_target():
    draft, context, target = memory(random_table(4)), Context.start([0], WARM), random_table(4, seed=1)
    counts = decoded(DySpec(), RecursiveRejection(), draft, context, target, 6, 1500)
    assert is_drawn_from(counts, pairs(target, 0))


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(UserError, match=r"must be from 0 to below 1"):
        DySpec(threshold=threshold)
