"""The union of several trees: the same path is one node, members take turns, the first has precedence."""

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.combined.union import Union, merged
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.drafters.retrieval.token_recycling import TokenRecycling
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from tests.decoding.markov import MarkovTarget, random_table

CHAIN = DraftTree.chain([1, 2, 3], labels=["a", "b", "c"])
#  1 -> 2 -> 4, 1 -> 5, 6
BUSHY = DraftTree([1, 6, 2, 5, 4], [ROOT, ROOT, 0, 0, 2], labels=["v", "w", "x", "y", "z"])


def test_members_take_turns_and_shared_paths_are_one_node_with_the_first_label():
    tree = merged([CHAIN, BUSHY], 99)
    # Turn by turn: 1; (1 is there) 6; 1 2; (1 2 is there) 1 5; 1 2 3; 1 2 4.
    assert tree.tokens == [1, 6, 2, 5, 3, 4]
    assert tree.parents == [ROOT, ROOT, 0, 0, 2, 2]
    assert tree.labels == ["a", "w", "b", "y", "c", "z"]


def test_a_budget_cuts_the_end_and_an_earlier_member_goes_first():
    assert merged([CHAIN, BUSHY], 3) == merged([CHAIN, BUSHY], 99).first(3)
    assert merged([CHAIN, DraftTree.chain([9])], 1).tokens == [1]
    assert merged([DraftTree.chain([9]), CHAIN], 99).tokens == [9, 1, 2, 3]


def test_the_same_token_below_other_parents_is_another_node():
    tree = merged([DraftTree.chain([1, 7]), DraftTree.chain([2, 7])], 99)
    assert tree.tokens == [1, 2, 7, 7]
    assert tree.parents == [ROOT, ROOT, 0, 1]


def test_one_draft_stays_as_it_is_and_none_is_none():
    assert merged([DraftTree(), CHAIN], 2) == CHAIN.first(2)
    assert merged([DraftTree(), DraftTree()], 2) == DraftTree()


def test_every_member_is_asked():
    drafter = Union([PromptLookup(), TokenRecycling()])
    memory = drafter.new_memory(Models(10))
    memory[1][2] = [8, 3]
    tree = drafter.propose(Context.start([1, 2, 3, 1, 2]), memory, 4)
    assert list(tree.tokens) == [3, 8, 1, 2]
    assert list(tree.parents) == [ROOT, ROOT, 0, 2]
    assert tree.labels[0][0] == "prompt_lookup"
    assert tree.labels[1][0] == "token_recycling"
    assert not drafter.chains()


def test_members_propose_their_most_probable_tokens_at_every_temperature():
    table = random_table(10)
    drafter = Union([PromptLookup(), DraftModel(length=3)])
    memory = drafter.new_memory(Models(10, lambda: MarkovTarget(table)))
    best = [int(table[5].argmax())]
    best += [int(table[best[0]].argmax())]
    for seed in range(5):
        context = Context.start([1, 2, 5], Sampling(0.7), seed)
        tree = drafter.propose(context, memory, 2)
        assert tree.draft_sampling is drafter.draft_sampling(Sampling(0.7)) is DraftSampling.DETERMINISTIC
        assert list(tree.tokens) == best
        assert context.draws, "other drafters of the sequence may draw"
