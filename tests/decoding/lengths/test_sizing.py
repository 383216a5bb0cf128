"""Sizes that pay, with costs and acceptance made up."""

import random

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Outcome
from hasten.accel.decoding.lengths.sizing import Adaptive, Costs, measure_costs
from hasten.accel.decoding.tree import DraftTree

FLAT = Costs({1: {1: 1.0, 32: 1.05}})
STEEP = Costs({1: {1: 1.0, 2: 1.9, 32: 30.0}})


def test_costs_between_measured_sizes_are_interpolated():
    costs = Costs({1: {1: 2.0, 4: 5.0, 8: 6.0}, 4: {1: 3.0, 4: 9.0}})
    assert costs.seconds(2) == 3.0
    assert costs.seconds(6) == 5.5
    assert costs.seconds(12) == 7.0  # the last step goes on
    assert costs.seconds(4, 4) == 9.0
    assert costs.seconds(4, 8) == 18.0  # twice as many sequences as were measured
    assert costs.efficiency(4) == 2 / 5


def simulated(costs, chance, drafting, passes=600, most=16, sequences=1):
    """Tokens and seconds of chains whose tokens are accepted with a chance each; drafting: seconds a node."""
    policy = Adaptive(costs, most)
    dice = random.Random(0)
    tokens, seconds, drafted = 0, 0.0, []
    for _ in range(passes):
        budget = policy.budget(sequences)
        tree = DraftTree()
        if budget:
            tree = DraftTree.chain([1] * budget)
            seconds += drafting * budget
            policy.drafted(budget, drafting * budget)
            tree = policy.select(tree, sequences, whole=False)
        accepted = 0
        while accepted < len(tree) and dice.random() < chance:
            accepted += 1
        policy.observe(Outcome(Context.start([0]), tree, list(range(accepted)), 2))
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
    policy = Adaptive(STEEP, 8)
    drafted = []
    for _ in range(40):
        budget = policy.budget(8)
        drafted.append(budget > 0)
        if budget:
            policy.drafted(8 * budget, 100.0)
            for _ in range(8):
                tree = policy.select(DraftTree.chain([1] * budget), 8, whole=False)
                policy.observe(Outcome(Context.start([0]), tree, [], 2))
    first = drafted.index(False)
    assert drafted[first:].index(True) == 16


def test_the_last_sequence_drafts_as_if_it_had_been_alone():
    policy = Adaptive(Costs({1: {1: 1.0, 17: 2.0}, 8: {1: 2.0, 17: 9.0}}), 16)
    dice = random.Random(0)
    drafted = []
    for sequences in [8] * 200 + [1] * 10:
        budget = policy.budget(sequences)
        policy.drafted(budget * sequences, 0.0)
        for _ in range(sequences):
            tree = policy.select(DraftTree.chain([1] * budget), sequences, whole=False)
            accepted = next((node for node in range(len(tree)) if dice.random() > 0.8), len(tree))
            policy.observe(Outcome(Context.start([0]), tree, list(range(accepted)), 2))
            drafted.append(len(tree))
    # Alone it settles at five to six; with the rate of eight it began with three.
    assert sum(drafted[-10:]) / 10 > 5


def test_as_many_as_pay_in_between():
    # One token more costs 0.1 of a plain pass: at a chance of one half the fifth is worth 1/32.
    costs = Costs({1: {1: 1.0, 17: 2.6}})
    _, _, drafted = simulated(costs, 0.5, 0.0)
    assert 1 <= sum(drafted[300:]) / 300 <= 4


def test_of_a_tree_the_nodes_that_were_accepted_most():
    policy = Adaptive(FLAT, 8)
    tree = DraftTree([5, 6, 7], [-1, -1, -1], labels=["often", "never", "never"])
    for _ in range(60):
        policy.budget(1)
        policy.observe(Outcome(Context.start([0]), tree, [0], 2))
    policy = _with(policy, Costs({1: {1: 1.0, 2: 1.2, 3: 1.6, 9: 4.0}}))
    policy.budget(1)
    assert list(policy.select(tree, 1, whole=False).tokens) == [5]
    assert policy.select(tree, 1, whole=True) is tree


def _with(policy, costs):
    policy.costs = costs
    return policy


def test_costs_are_measured_at_every_size():
    from hasten.accel.decoding.targets.loading import load_target
    from hasten.accel.models.checkpoint import resolve

    target = load_target(resolve("embedded:draft"), torch.float32)
    costs = measure_costs(target, [4, 16], sequences=2, context=20)
    assert {count: list(by_width) for count, by_width in costs.measured.items()} == {1: [1, 4, 16], 2: [1, 4, 16]}
    assert all(seconds > 0 for by_width in costs.measured.values() for seconds in by_width.values())
    assert costs.seconds(16) == pytest.approx(costs.measured[1][16])
