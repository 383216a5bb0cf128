"""Lengths that pay, with made-up costs and acceptance."""

import random

import pytest

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.adaptive import Adaptive
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.errors import UserError

FLAT = PassCosts({1: {1: 1.0, 32: 1.05}})
STEEP = PassCosts({1: {1: 1.0, 2: 1.9, 32: 30.0}})


def started(costs, max_nodes, **fields):
    return Adaptive(**fields).start(lambda: costs, max_nodes)


def observed(policy, tree, chance, dice):
    """Number of accepted tokens of a chain of ones; the text has a one with a chance, also after the last one."""
    accepted = next((node for node in range(len(tree)) if dice.random() >= chance), len(tree))
    agrees = accepted == len(tree) and dice.random() < chance
    policy.observe(Outcome(Context.start([0]), tree, list(range(accepted)), 1 if agrees else 2))
    return accepted


def simulated(costs, chance, drafting, passes=600, max_nodes=16, sequences=1):
    """Tokens and seconds of chains whose tokens are accepted with a chance each; drafting: seconds a node."""
    policy = started(costs, max_nodes)
    dice = random.Random(0)
    tokens, seconds, drafted = 0, 0.0, []
    for _ in range(passes):
        budget = policy.budget(sequences)
        tree = DraftTree()
        if budget:
            tree = DraftTree.chain([1] * budget)
            seconds += drafting * budget
            policy.record_drafting(budget, drafting * budget)
            [tree] = policy.select([tree], sequences, [False])
        accepted = observed(policy, tree, chance, dice)
        tokens += accepted + 1
        seconds += costs.seconds(len(tree) + 1, sequences) / sequences
        drafted.append(len(tree))
    return tokens, seconds, drafted


def test_long_drafts_where_passes_are_flat_and_drafts_are_good():
    tokens, seconds, drafted = simulated(FLAT, 0.9, 0.0)
    assert sum(drafted[300:]) / 300 > 10
    # The chain of 16 would give (1 - 0.9^17) / 0.1 tokens a pass.
    assert tokens / seconds > 0.9 * (1 - 0.9**17) / 0.1 / 1.05


def test_drafting_stops_where_drafts_are_bad():
    tokens, seconds, drafted = simulated(STEEP, 0.2, 0.0)
    assert sum(drafted[300:]) / 300 < 0.5
    assert tokens / seconds > 0.95


def test_drafting_stops_where_drafts_cost_more_than_they_give():
    tokens, seconds, _ = simulated(FLAT, 0.6, 1.0, passes=2000)
    assert tokens / seconds > 0.9


def test_sequences_of_one_pass_pause_once():
    # By the prior a token more pays for one and a half times as long a pass; drafting itself takes too long.
    policy = started(PassCosts({1: {1: 1.0, 9: 1.1}}), 8)
    drafted, probed = [], []
    for _ in range(80):
        budget = policy.budget(8)
        drafted.append(budget > 0)
        probed.append(policy.probes())
        if budget:
            policy.record_drafting(8 * budget, 100.0)
            count = 1 if policy.probes() else 8
            for tree in policy.select([DraftTree.chain([1] * budget)] * count, 8, [False] * count):
                policy.observe(Outcome(Context.start([0]), tree, [], 2))
    first = drafted.index(False)
    assert drafted[first:].index(True) == 64
    assert probed[: first + 65] == [True] * 4 + [False] * 64 + [True], "one sequence shows whether drafting pays"


def many(chance, costs, passes, seconds_of_drafting=0.1):
    """Passes of eight sequences, each (sequences that were drafted for, nodes that were verified)."""
    policy, dice, done = started(costs, 8), random.Random(0), []
    contexts = [Context.start([0]) for _ in range(8)]
    for _ in range(passes):
        budget = policy.budget(8)
        drafting = 0 if not budget else 1 if policy.probes() else 8
        trees = [DraftTree()] * 8
        if drafting:
            proposed = [DraftTree.chain([1] * budget)] * drafting
            trees[:drafting] = policy.select(proposed, 8, [False] * drafting)
        for context, tree in zip(contexts, trees, strict=True):
            token = 1 if dice.random() < chance else 2
            accepted = [0] if len(tree) and token == 1 else []
            policy.observe(Outcome(context, tree, accepted, token if not accepted else 2))
        if budget:
            policy.record_drafting(sum(map(len, trees)), seconds_of_drafting)
        done.append((drafting, sum(map(len, trees))))
    return done


DEAR = PassCosts({1: {1: 1.0, 2: 1.1, 9: 1.5}, 8: {1: 1.7, 2: 2.5, 9: 8.0}})


def test_several_sequences_begin_with_a_pause_where_drafting_is_not_expected_to_pay():
    done = many(0.1, DEAR, 250)
    assert done[:64] == [(0, 0)] * 64
    assert {drafting for drafting, _ in done} == {0, 1}
    assert sum(drafting for drafting, _ in done) == 8, "four before each of two further pauses"
    assert not any(verified for _, verified in done)


def test_probes_that_are_not_verified_find_that_drafting_pays():
    done = many(0.98, DEAR, 500)
    assert done[:64] == [(0, 0)] * 64
    assert any(drafting == 8 and verified >= 8 for drafting, verified in done[64:])
    assert sum(drafting == 8 for drafting, _ in done[-100:]) > 90


def test_a_pause_of_many_sequences_ends_when_few_are_left():
    policy = started(DEAR, 8)
    assert [policy.budget(8) for _ in range(3)] == [0, 0, 0]
    assert policy.budget(5) == 0
    assert policy.budget(4) > 0


def test_a_pause_ends_with_the_text_for_which_drafting_did_not_pay():
    policy = started(STEEP, 8)
    drafted = []
    for _ in range(100):
        budget = policy.budget(1)
        drafted.append(budget > 0)
        trees = policy.select([DraftTree.chain([1] * budget)], 1, [False]) if budget else [DraftTree()]
        policy.record_drafting(budget, 0.2 * bool(budget))
        policy.observe(Outcome(Context.start([0]), trees[0], [], 2))
    paused = drafted.index(False) + 1
    assert not any(drafted[paused : paused + 15]), "the first pause"
    assert not drafted[-1], "another pause"
    policy.begin_sequence()
    assert policy.budget(1) > 0


def test_the_last_sequence_drafts_as_if_it_had_been_alone():
    policy = started(PassCosts({1: {1: 1.0, 17: 2.0}, 8: {1: 2.0, 17: 9.0}}), 16)
    dice = random.Random(0)
    drafted = []
    for sequences in [8] * 200 + [1] * 10:
        budget = policy.budget(sequences)
        policy.record_drafting(budget * sequences, 0.0)
        for tree in policy.select([DraftTree.chain([1] * budget)] * sequences, sequences, [False] * sequences):
            observed(policy, tree, 0.8, dice)
            drafted.append(len(tree))
    # Alone it settles at five to six; with the rate of eight it began with three.
    assert sum(drafted[-10:]) / 10 > 5


def test_as_many_as_pay_in_between():
    # One token more costs 0.1 of a plain pass: at a chance of one half the fifth is worth 1/32.
    costs = PassCosts({1: {1: 1.0, 17: 2.6}})
    _, _, drafted = simulated(costs, 0.5, 0.0)
    assert 1 <= sum(drafted[300:]) / 300 <= 4


def test_of_a_tree_the_nodes_that_were_accepted_most():
    policy = started(FLAT, 8)
    tree = DraftTree([5, 6, 7], [-1, -1, -1], labels=["often", "never", "never"])
    for _ in range(60):
        policy.budget(1)
        policy.observe(Outcome(Context.start([0]), tree, [0], 2))
    policy = _with(policy, PassCosts({1: {1: 1.0, 2: 1.2, 3: 1.6, 9: 4.0}}))
    policy.budget(1)
    assert list(policy.select([tree], 1, [False])[0].tokens) == [5]
    assert policy.select([tree], 1, [True])[0] is tree


def test_a_pass_is_not_made_wider_for_all_sequences_by_a_good_draft_of_one():
    # A second token in each of four sequences takes as long as 1.8 tokens.
    costs = PassCosts({1: {1: 1.0, 2: 1.1}, 4: {1: 1.0, 2: 1.45, 3: 1.9}})
    good, bad = (DraftTree([5], [-1], labels=[label]) for label in ("good", "bad"))
    policy = started(costs, 8)
    for _ in range(100):
        if policy.budget(4) and policy.probes():
            policy.select([good], 4, [False])
        policy.observe(Outcome(Context.start([0]), good, [0], 2))
        policy.observe(Outcome(Context.start([0]), bad, [], 2))
    policy.budget(4)
    assert not policy.probes()
    assert [len(tree) for tree in policy.select([good, bad, bad, bad], 4, [False] * 4)] == [0, 0, 0, 0]
    # Three good drafts pay for the pass; in the fourth sequence the place would be empty otherwise.
    assert [len(tree) for tree in policy.select([good, bad, good, good], 4, [False] * 4)] == [1, 1, 1, 1]
    # A draft that must stay whole makes the pass wide, and then nodes of the others cost nothing.
    assert [len(tree) for tree in policy.select([good, bad, bad, bad], 4, [True] + [False] * 3)] == [1, 1, 1, 1]


def test_nothing_is_learned_in_a_long_pause_until_shortly_before_its_end():
    policy = started(STEEP, 8, first_pause=16, longest_pause=256)
    learned, drafted = [], []
    for _ in range(1500):
        budget = policy.budget(1)
        drafted.append(budget > 0)
        learned.append(policy.learns())
        trees = policy.select([DraftTree.chain([1] * budget)], 1, [False]) if budget else [DraftTree()]
        policy.record_drafting(budget, 0.2 * bool(budget))
        policy.observe(Outcome(Context.start([0]), trees[0], [], 2))
    assert all(learns for learns, drafts in zip(learned, drafted, strict=True) if drafts)
    assert all(learned[index - 1] for index in range(1, 1500) if drafted[index])
    assert sum(learned[500:]) < 400


def test_a_prompt_is_observed_where_drafting_gains():
    assert started(FLAT, 16).observes_prompt(1)
    assert not started(STEEP, 16).observes_prompt(1)
    policy = started(FLAT, 16)
    for _ in range(200):
        policy.budget(1)
        policy.observe(Outcome(Context.start([0]), DraftTree(), [], 2))
    assert not policy.observes_prompt(1), "what is drafted here gains nothing"


def _with(policy, costs):
    policy.costs = costs
    return policy


def test_the_maximum_budget_is_requested_at_every_exploring_pass_and_its_first_nodes_are_verified():
    policy = started(FLAT, 16, explore_every=4, explore_nodes=3, explore_share=1.0)
    verified = []
    for _ in range(24):
        budget = policy.budget(1)
        policy.record_drafting(budget, 0.0)
        [tree] = policy.select([DraftTree.chain([1] * budget)], 1, [False]) if budget else [DraftTree()]
        verified.append((budget, len(tree)))
        policy.observe(Outcome(Context.start([0]), tree, [], 2))
    assert [verified[index][0] for index in (3, 7)] == [16, 16]
    assert verified[7][1] >= 3


@pytest.mark.parametrize("wrong", [{"explore_every": 0}, {"first_pause": 0}, {"longest_pause": 3}])
def test_a_wrong_hyper_parameter_is_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value} is wrong"):
        Adaptive(**wrong)


@pytest.mark.parametrize(("virtual", "pays"), [(0, True), (4, False)])
def test_virtual_nodes_cost_what_other_nodes_cost(virtual, pays):
    # A token that is accepted in 3 of 10 passes costs a tenth of a pass, and with 4 virtual nodes half of one.
    policy = started(PassCosts({1: {1: 1.0, 33: 4.2}}), virtual + 1)
    policy.count_virtual(lambda budget: min(virtual, budget))
    dice, drafted = random.Random(0), 0
    for number in range(600):
        budget = policy.budget(1)
        tree = DraftTree()
        if budget:
            policy.record_drafting(1, 0.0)
            [tree] = policy.select([DraftTree([1], [-1])], 1, [False])
        observed(policy, tree, 0.3, dice)
        drafted += number >= 300 and budget > 0
    assert (drafted > 250) if pays else (drafted < 100)
