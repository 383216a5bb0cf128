"""The chain is the draft model's own, whatever the inner drafter guesses; guesses that are right save passes."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.drafters.model.hierarchy import Hierarchy
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftSampling, DraftTree
from hasten.accel.errors import UserError
from tests.decoding.markov import MarkovTarget, random_table


@dataclass(frozen=True)
class Bushy(Drafter):
    """Two children everywhere, two levels: it guesses right now and then, and writes down what it is told."""

    observes: ClassVar[int] = 3
    seen: list = field(default_factory=list, hash=False, compare=False)

    def propose(self, context, memory, budget):
        return DraftTree([0, 1, 2, 3, 4, 5], [ROOT, ROOT, 0, 0, 1, 1])

    def observe(self, memory, outcome):
        self.seen.append((list(outcome.context.tokens), outcome.committed, outcome.top_tokens))


def models(max_length=1000):
    return Models(6, lambda: MarkovTarget(random_table(6, order=2, seed=1), max_length))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.8, top_k=4, repetition_penalty=1.3)])
@pytest.mark.parametrize("inner", [PromptLookup(min_ngram=1), Bushy()])
def test_the_chain_is_that_of_the_draft_model_alone(sampling, inner):
    drafter, alone = Hierarchy(inner), DraftModel(length=8)
    memory, its = drafter.new_memory(models()), alone.new_memory(models())
    assert drafter.draft_sampling(sampling) is alone.draft_sampling(sampling)
    assert drafter.chains()
    for seed in range(10):
        context, other = (Context.start([1, 2, 3, 1, 2], sampling, seed) for _ in range(2))
        drafter.begin(context, memory)
        for step in range(5):
            found, expected = drafter.propose(context, memory, 8), alone.propose(other, its, 8)
            assert list(found.tokens) == list(expected.tokens)
            assert list(found.parents) == list(expected.parents)
            for parent in expected.draft_probs or ():
                assert torch.equal(found.draft_probs[parent], expected.draft_probs[parent])
            # The target accepts some of it and goes on in its own way.
            for each in (context, other):
                each.tokens += [*expected.tokens[: step + 1], (seed + step) % 6]
        drafter.end(context, memory)
        alone.end(other, its)


def test_guesses_that_are_right_save_passes_of_the_draft_model():
    table = torch.zeros(6, 6)
    for token in range(6):
        table[token, (token + 1) % 6] = 10.0
    counting = Models(6, lambda: MarkovTarget(table))
    drafter = Hierarchy(PromptLookup())
    memory = drafter.new_memory(counting)
    tree = drafter.propose(Context.start([0, 1, 2, 3, 4, 5, 0, 1, 2]), memory, 8)
    assert list(tree.tokens) == [3, 4, 5, 0, 1, 2, 3, 4]
    # One pass of the prompt and seven copied tokens, the last one taken from the copy itself; it gives the eighth.
    assert memory.target.passes == [(1, 16)]


def test_a_rejected_chain_is_rolled_back_in_the_inner_index_which_is_not_built_again():
    drafter = Hierarchy(PromptLookup())
    memory, fresh = drafter.new_memory(models()), drafter.new_memory(models())
    context = Context.start([1, 2, 3, 4] * 20)
    drafter.propose(context, memory, 8)
    index = context.state[drafter].state[drafter.drafter]
    for step in range(30):
        context.tokens.append(step % 5)
        tree = drafter.propose(context, memory, 8)
        assert tree == drafter.propose(Context.start(context.tokens), fresh, 8)
        assert context.state[drafter].state[drafter.drafter] is index
        assert context.state[drafter].tokens[: len(context.tokens)] == context.tokens


def test_the_inner_drafter_sees_the_chain_so_far_and_learns_from_the_draft_model():
    inner = Bushy()
    drafter = Hierarchy(inner, length=6)
    memory = drafter.new_memory(models())
    context = Context.start([1, 2, 3])
    tokens = list(drafter.propose(context, memory, 6).tokens)
    chain = []
    table = random_table(6, order=2, seed=1)
    for before, committed, top in inner.seen:
        assert before == [1, 2, 3, *chain]
        assert torch.equal(top[0], table[before[-2], before[-1]].topk(3).indices)
        chain += committed
    assert chain == tokens
    assert context.tokens == [1, 2, 3]


def test_sequences_that_share_passes_get_the_chains_that_they_get_alone():
    drafter = Hierarchy(PromptLookup())
    starts = [([1, 2, 3, 1, 2], 0), ([5], 1), (list(range(6)) * 12, 2)]
    alone, together = drafter.new_memory(models()), drafter.new_memory(models())
    expected = [drafter.propose(Context.start(tokens, Sampling(1.0), seed), alone, 8) for tokens, seed in starts]
    contexts = [Context.start(tokens, Sampling(1.0), seed) for tokens, seed in starts]
    found = drafter.propose_all(contexts, together, 8)
    assert [list(tree.tokens) for tree in found] == [list(tree.tokens) for tree in expected]


def test_a_sequence_longer_than_the_draft_models_context_has_no_draft():
    drafter = Hierarchy(PromptLookup())
    memory = drafter.new_memory(models(max_length=16))
    short, long = (Context.start([1, 2] * count) for count in (4, 5))
    assert [len(tree) for tree in drafter.propose_all([long, short], memory, 8)] == [0, 8]
    assert drafter.propose_all([long], memory, 8) == [DraftTree()]


def test_greedy_decoding_is_left_as_it_is():
    target = random_table(6, order=2, seed=4)
    requests = [Request(str(number), [1, 2, number], 40) for number in range(4)]
    plain = {each.id: each.token_ids for each in Engine(MarkovTarget(target)).decode(requests)}
    engine = Engine(MarkovTarget(target), Hierarchy(PromptLookup()), models=models(), in_flight=3)
    found = {each.id: each.token_ids for each in engine.decode(requests)}
    assert found == plain


def test_a_kind_of_draft_is_told_apart_by_temperature():
    assert Hierarchy(PromptLookup()).draft_sampling(Sampling()) is DraftSampling.DETERMINISTIC
    assert Hierarchy(PromptLookup()).draft_sampling(Sampling(1.0)) is DraftSampling.INDEPENDENT


@pytest.mark.parametrize("inner", [DraftModel(), "prompt_lookup"])
def test_an_inner_drafter_that_cannot_be_one_is_refused(inner):
    with pytest.raises(UserError, match="drafter="):
        Hierarchy(inner)


@pytest.mark.parametrize("wrong", [{"length": 0}, {"nodes": 0}])
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=0"):
        Hierarchy(PromptLookup(), **wrong)
