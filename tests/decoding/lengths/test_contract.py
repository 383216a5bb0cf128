"""What every length in conf/draft_length must do."""

import pickle
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import ROOT, DraftTree

CONFIGS = sorted((Path(__file__).parents[3] / "conf" / "draft_length").glob("*.yaml"))
LIMIT = 12
COSTS = PassCosts({1: {1: 1.0, 13: 1.6}, 4: {1: 1.5, 13: 4.0}})


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def length(request):
    return instantiate(OmegaConf.load(request.param))


def passes(controller, count, sequences=1):
    """Budgets, trees proposed and trees verified; every second token of a draft is accepted."""
    for number in range(count):
        budget = controller.budget(sequences)
        yield_of_drafter = DraftTree.chain(list(range(budget)))
        trees = controller.select([yield_of_drafter] * sequences, sequences, [False] * sequences)
        controller.record_drafting(budget * sequences, 0.01 * budget)
        for tree in trees:
            accepted = range(len(tree) * (number % 2))
            controller.observe(Outcome(Context.start([0]), tree, accepted, 1))
            yield budget, yield_of_drafter, tree


def test_no_budget_is_above_the_largest_draft(length):
    controller = length.start(lambda: COSTS, LIMIT)
    assert controller.max_nodes == length.max_tokens(LIMIT)
    budgets = [budget for budget, _, _ in passes(controller, 100, 4)]
    assert all(0 <= budget <= controller.max_nodes for budget in budgets)
    assert max(budgets) > 0


def test_the_part_that_is_verified_has_every_nodes_parent(length):
    controller = length.start(lambda: COSTS, LIMIT)
    for _, proposed, verified in passes(controller, 60):
        assert list(verified.tokens) == list(proposed.tokens)[: len(verified)]  # of a chain a beginning
        assert all(ROOT <= parent < node for node, parent in enumerate(verified.parents))


def test_a_draft_that_must_stay_whole_stays_whole(length):
    controller = length.start(lambda: COSTS, LIMIT)
    for _ in range(40):
        tree = DraftTree.chain(list(range(controller.budget(1))))
        assert controller.select([tree], 1, [True])[0] is tree
        controller.record_drafting(len(tree), 0.0)
        controller.observe(Outcome(Context.start([0]), tree, [], 1))


def test_costs_are_only_measured_where_the_length_says_that_it_reads_them(length):
    measured = []
    length.start(lambda: measured.append(1) or COSTS, LIMIT)
    assert bool(measured) == length.needs_costs


def test_two_controllers_of_one_length_share_nothing_and_a_length_is_pickled(length):
    copy = pickle.loads(pickle.dumps(length))
    assert copy == length
    expected = [budget for budget, _, _ in passes(length.start(lambda: COSTS, LIMIT), 50)]
    assert [budget for budget, _, _ in passes(copy.start(lambda: COSTS, LIMIT), 50)] == expected
    assert [budget for budget, _, _ in passes(length.start(lambda: COSTS, LIMIT), 50)] == expected
