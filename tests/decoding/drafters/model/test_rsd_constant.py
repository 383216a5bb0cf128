from collections import Counter
from itertools import permutations

import pytest
import torch
from omegaconf import OmegaConf

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.drafters.model.rsd_constant import RSDConstant
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.decoding.verifiers.recursive_rejection import RecursiveRejection
from hasten.accel.errors import UserError
from tests.decoding.markov import MarkovTarget, decoded, grown, is_drawn_from, pairs, random_table

WARM = Sampling(temperature=1.0)


def memory(vocabulary=6, order=1):
    return SmallModel(MarkovTarget(random_table(vocabulary, order)))


@pytest.mark.parametrize("budget", [2, 3])
def test_siblings_are_drawn_in_order_without_replacement_whatever_the_budget(budget):
    draft, context = memory(vocabulary=4), Context.start([0], WARM)
    counts = Counter(tuple(grown(RSDConstant((2, 2)), draft, context, budget).tokens[:2]) for _ in range(2000))
    q = draft.target.table[0].softmax(-1).tolist()
    assert is_drawn_from(counts, {(a, b): q[a] * q[b] / (1 - q[a]) for a, b in permutations(range(4), 2)})


def test_what_is_verified_recursively_follows_the_target():
    draft, context, target = memory(vocabulary=4), Context.start([0], WARM), random_table(4, seed=1)
    counts = decoded(RSDConstant((2, 2)), RecursiveRejection(), draft, context, target, 5, 1500)
    assert is_drawn_from(counts, pairs(target, 0))


def test_every_node_has_as_many_children_as_its_level_says():
    draft = memory(order=2)
    tree = RSDConstant((3, 2, 1)).propose(Context.start([1, 2], WARM), draft, 99)
    assert tree.draft_sampling is DraftSampling.WITHOUT_REPLACEMENT
    assert len(tree.children[ROOT]) == 3
    assert [len(tree.children.get(node, ())) for node in range(15)] == [2] * 3 + [1] * 6 + [0] * 6
    assert [width for _, width in draft.target.passes] == [2, 3, 6]
    for node, probs in tree.draft_probs.items():
        before, last = [1, 2, *(tree.tokens[each] for each in tree.path(node))][-2:]
        assert torch.equal(probs, draft.target.table[before, last].softmax(-1))


def test_the_shape_of_a_smaller_tree_is_settled_before_the_draw():
    draft, context = memory(), Context.start([0], WARM)
    shapes = {tuple(grown(RSDConstant((2, 3, 1)), draft, context, 5).parents) for _ in range(50)}
    # The two draws, the first draw below each, and the second one below the first.
    assert shapes == {(ROOT, ROOT, 0, 0, 1)}


def test_a_distribution_with_too_few_tokens_leaves_nodes_out():
    context = Context.start([0], Sampling(temperature=1.0, top_k=1))
    tree = RSDConstant((2, 2, 1)).propose(context, memory(), 16)
    assert tree.is_chain
    assert len(tree) == 3


def test_at_temperature_0_children_are_the_most_probable_ones():
    draft = memory(order=2)
    tree = RSDConstant((2, 2)).propose(Context.start([1, 2]), draft, 99)
    top = draft.target.table.topk(2).indices
    first = top[1, 2].tolist()
    assert tree.tokens[:2] == first
    below = [[tree.tokens[child] for child in tree.children[node]] for node in (0, 1)]
    assert below == [top[2, token].tolist() for token in first]
    assert (tree.draft_sampling, tree.draft_probs) == (DraftSampling.DETERMINISTIC, None)


def test_a_config_may_give_a_list():
    drafter = RSDConstant(OmegaConf.create([2, 1]))
    assert drafter == RSDConstant((2, 1))
    hash(drafter)
    assert not drafter.chains()
    assert RSDConstant((1, 1)).chains()


@pytest.mark.parametrize("branching", [(), (2, 0), 3, "22"])
def test_nothing_to_branch_is_refused(branching):
    with pytest.raises(UserError, match="must be a list with the number of children at each depth, 1 or more"):
        RSDConstant(branching)
