"""The draft model reads the chunks that share words with the end of a long sequence, in their order, and the end."""

from math import log

import numpy as np
import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.drafters.model.rapid import Rapid, relevance
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.errors import UserError
from tests.decoding.markov import MarkovTarget, random_table

SMALL = Rapid(chunk=2, keep=2, recent=3, refresh=4)
LONG = [5, 6, 7, 8, 9, 9, 7, 3, 1, 7, 3]


def models(max_length=1000):
    return Models(12, lambda: MarkovTarget(random_table(12, order=2, seed=1), max_length))


def test_relevance_is_bm25_by_hand():
    chunks = np.array([[5, 6], [7, 8], [7, 7]])
    # Two of three chunks hold 7 and one holds 5; k1 = 1.2 dampens the second 7.
    seven, five = log(1 + 1.5 / 2.5), log(1 + 2.5 / 1.5)
    found = relevance(chunks, np.array([7, 7, 2, 5]))
    np.testing.assert_allclose(found, [five, seven, seven * 2 * 2.2 / 3.2])


def test_the_best_chunks_are_read_in_their_order_with_the_end():
    # Chunks 5 6, 7 8, 9 9, 7 3; the end is 1 7 3.
    assert SMALL.shorten(LONG) == [7, 8, 7, 3, 1, 7, 3]


def test_a_sequence_that_is_not_longer_than_what_is_read_is_read_whole():
    assert SMALL.shorten(LONG[:7]) == LONG[:7]


def test_what_is_left_over_of_the_last_chunk_is_read_with_the_end():
    # Chunks 5 6, 7 8, 9 9 and a 7 that is none; the end is 3 1 7.
    assert SMALL.shorten(LONG[:10]) == [5, 6, 7, 8, 7, 3, 1, 7]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
def test_drafts_are_those_of_the_draft_model_on_what_is_read(sampling):
    alone = DraftModel()
    memory, its = SMALL.new_memory(models()), alone.new_memory(models())
    context = Context.start(LONG, sampling)  # held: the slot of one that is gone is free
    found = SMALL.propose(context, memory, 5)
    expected = alone.propose(Context.start([7, 8, 7, 3, 1, 7, 3], sampling), its, 5)
    assert list(found.tokens) == list(expected.tokens)
    assert len(memory.target.committed(0)) == 7


def test_chunks_are_chosen_anew_after_so_many_tokens_and_in_between_the_text_grows():
    memory = SMALL.new_memory(models())
    context = Context.start(LONG)
    read = []
    for _ in range(5):
        SMALL.propose(context, memory, 5)
        read.append(list(memory.target.committed(0)))
        context.tokens += [9, 5]
    start = [7, 8, 7, 3, 1, 7, 3]
    assert read[:2] == [start, [*start, 9, 5]]
    # At 15 tokens: of the chunks before 5 9 5 the first and that of nines share words with it.
    assert read[2] == [5, 6, 9, 9, 5, 9, 5]
    assert read[3] == [*read[2], 9, 5]
    assert len(read[4]) == 7


def test_a_sequence_longer_than_the_draft_models_context_is_drafted_for():
    memory, its = SMALL.new_memory(models(16)), DraftModel().new_memory(models(16))
    context = Context.start(LONG * 3)
    assert len(DraftModel().propose(context, its, 5)) == 0
    assert len(SMALL.propose(context, memory, 5)) == 5


def test_a_penalty_counts_tokens_that_are_not_read():
    sampling = Sampling(1.0, repetition_penalty=1e6)
    found = SMALL.propose(Context.start(LONG, sampling), SMALL.new_memory(models()), 1)
    table = random_table(12, order=2, seed=1)
    expected = sampling.probs(sampling.penalised(table[7, 3], torch.tensor(LONG)))
    torch.testing.assert_close(found.draft_probs[-1], expected)


def test_an_ended_sequence_frees_its_cache():
    memory = SMALL.new_memory(models())
    for _ in range(3):
        context = Context.start(LONG)
        SMALL.propose(context, memory, 5)
        SMALL.end(context, memory)
    assert memory.target.slots == 1
    assert memory.target.committed(0) == []


def test_greedy_decoding_is_left_as_it_is():
    target = random_table(12, order=2, seed=4)
    requests = [Request(str(number), [*LONG, number], 40) for number in range(4)]
    plain = {each.id: each.token_ids for each in Engine(MarkovTarget(target)).decode(requests)}
    engine = Engine(MarkovTarget(target), SMALL, models=models(), in_flight=3)
    assert {each.id: each.token_ids for each in engine.decode(requests)} == plain


@pytest.mark.parametrize("wrong", [{"length": 0}, {"chunk": 0}, {"recent": 0}, {"refresh": 0}, {"keep": -1}])
def test_wrong_hyper_parameters_are_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value} must be"):
        Rapid(**wrong)
