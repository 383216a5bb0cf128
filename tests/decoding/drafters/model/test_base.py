import random
import weakref

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.model.base import SmallModel
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError
from tests.decoding.markov import MarkovTarget, random_table
from tests.models import tiny

TABLE = random_table(9, order=2)


def memory(max_length=1 << 20):
    return SmallModel(MarkovTarget(TABLE, max_length))


def test_the_cache_follows_what_was_committed_after_rejections():
    model = tiny.build("llama")
    draft = SmallModel(TransformersTarget(model))
    random.seed(0)
    context = Context.start([5, 6, 7])
    for _ in range(6):
        used = draft.start(context, 8)
        fresh = SmallModel(TransformersTarget(model)).start(Context.start(context.tokens), 8)
        # Where chunks differ sums are taken in another order.
        torch.testing.assert_close(used, fresh, rtol=1e-4, atol=1e-5)
        drafted = random.choices(range(96), k=4)
        draft.extend(context, drafted[:3], [ROOT, 0, 0])
        draft.extend(context, drafted[3:], [2])
        # The second branch is accepted, the first, or nothing, and a token that was not drafted follows.
        accepted = random.choice([[drafted[0], drafted[2], drafted[3]], drafted[:2], drafted[:1], []])
        context.tokens += [*accepted, random.randrange(96)]


def test_new_nodes_see_their_ancestors():
    draft, context = memory(), Context.start([1, 2])
    assert torch.equal(draft.start(context, 8), TABLE[1, 2])
    assert torch.equal(draft.extend(context, [3, 4], [ROOT, ROOT]), TABLE[2, [3, 4]])
    assert torch.equal(draft.extend(context, [5, 6, 7], [1, 0, 1]), TABLE[[4, 3, 4], [5, 6, 7]])


def test_a_sequence_that_lags_little_behind_takes_one_pass():
    draft, context = memory(), Context.start([1, 2])
    draft.start(context, 8)
    context.tokens += [3, 4, 5]
    draft.target.passes.clear()
    assert torch.equal(draft.start(context, 8), TABLE[4, 5])
    assert draft.target.passes == [(1, 3)]


def test_sequences_start_together_as_they_start_alone():
    random.seed(1)
    contexts = [Context.start(random.choices(range(9), k=length)) for length in (3, 1, 700, 20, 40)]
    draft, alone = memory(), [memory() for _ in contexts]
    for _ in range(6):
        random.shuffle(contexts)  # so that slots are not in order
        together = draft.start_all(contexts, 4)
        tokens = [random.choices(range(9), k=count) for count in (1, 2, 3, 2, 1)]
        parents = [[ROOT, 0, 0][: len(each)] for each in tokens]
        extended = draft.extend_all(contexts, tokens, parents)
        for index, (context, one) in enumerate(zip(contexts, alone, strict=True)):
            assert torch.equal(together[index], one.start(context, 4))
            assert torch.equal(extended[index], one.extend(context, tokens[index], parents[index]))
            context.tokens += random.choices([tokens[index][:1], []])[0] + random.choices(range(9), k=2)


def test_sequences_that_lag_little_behind_start_in_one_pass():
    draft, contexts = memory(), [Context.start([1] * length) for length in (3, 30, 5)]
    draft.start_all(contexts, 4)
    assert draft.target.passes == [(3, 30)]
    assert draft.last.logits.shape[0] == 3


def test_a_sequence_that_is_too_long_starts_without_logits_and_others_with():
    draft = memory(max_length=40)
    found = draft.start_all([Context.start([1] * 37), Context.start([2, 3]), Context.start([4] * 36)], 4)
    assert [logits is None for logits in found] == [True, False, False]
    assert torch.equal(found[1], TABLE[2, 3])
    assert draft.start(Context.start([1] * 37), 4) is None


def test_a_wide_start_beside_a_sequence_that_ends_with_the_context_fits():
    draft = memory(max_length=1100)
    long, short = Context.start([1] * 1090), Context.start([2] * 30)
    draft.start_all([long, short], 10)
    for nodes in (list(range(9)), [3]):
        draft.extend_all([long, short], [[1], nodes], [[ROOT], [ROOT] * len(nodes)])


def test_caches_that_had_to_grow_give_the_same():
    draft, contexts = memory(), [Context.start([1, index]) for index in range(5)]
    for context in contexts:
        draft.start(context, 4)
    contexts[0].tokens += [3] * 2000
    for context in [*contexts, *contexts]:
        assert torch.equal(draft.start(context, 4), TABLE[context.tokens[-2], context.tokens[-1]])


def test_slots_of_sequences_that_ended_or_were_forgotten_are_free_again():
    draft = memory()
    for index in range(6):
        context = Context.start([1, 2])
        draft.start(context, 4)
        if index % 2:
            draft.end(context)
            draft.end(context)  # twice does no harm
        del context
        assert not draft._slots
        assert not draft._finalizers
    assert draft.target.slots == 1


def test_a_context_does_not_keep_the_memory_alive():
    draft, context = memory(), Context.start([1, 2])
    draft.start(context, 4)
    gone = weakref.ref(draft)
    del draft
    assert gone() is None
    del context  # and its end finds nobody


def test_at_temperature_0_a_level_is_ranked_by_the_plain_distribution():
    draft = memory()
    context = Context.start([1, 2], Sampling(temperature=0.0, top_k=2, top_p=0.1))
    torch.testing.assert_close(draft.level(context, TABLE[3], [[]] * 9), TABLE[3].softmax(-1))


def test_a_level_is_what_every_row_alone_is_under_the_penalty_along_its_path():
    draft = memory()
    context = Context.start([1, 2], Sampling(temperature=0.7, top_k=4, repetition_penalty=1.5))
    rows, paths = TABLE[3, :2], [[6, 7], [5]]
    alone = [draft.probs(context, row, path) for row, path in zip(rows, paths, strict=True)]
    assert torch.equal(draft.level(context, rows, paths), torch.stack(alone))
    assert not torch.equal(alone[0], draft.probs(context, rows[0], []))


def test_without_a_draft_model_it_is_asked_for():
    with pytest.raises(UserError, match="draft=PATH"):
        SmallModel.of(Models(9))
