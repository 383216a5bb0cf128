"""A token that the smallest sub-model is not confident of is drafted by the next one."""

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.model.s2d import SortedDrafting
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.s2d import SortedDraft
from tests.decoding.markov import MarkovTarget, random_table
from tests.training.heads.test_draft_models import FACTS, made

SIZE = 8


class Nested(MarkovTarget):
    """A draft of two sub-models: of one layer, a table that is confident after even tokens only."""

    def __init__(self, small, whole):
        super().__init__(whole)
        self.small = small

    def first_layers(self, count):
        return MarkovTarget(self.small) if count == 1 else MarkovTarget(self.table)


def tables():
    """The small model says token + 1 after even ones, the whole one token + 3 after all."""
    small, whole = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
    for token in range(SIZE):
        small[token, (token + 1) % SIZE] = 10.0 if token % 2 == 0 else 0.1
        whole[token, (token + 3) % SIZE] = 20.0
    return small, whole


def memory_of(drafter):
    return drafter.new_memory(Models(SIZE, lambda: Nested(*tables())))


def test_a_token_is_drafted_by_the_first_sub_model_that_is_confident():
    drafter = SortedDrafting(length=4, exits=(1, 2))
    memory = memory_of(drafter)
    # 2 → 3 small, 3 → 6 whole, 6 → 7 small, 7 → 2 whole.
    assert list(drafter.propose(Context.start([1, 2]), memory, 8).tokens) == [3, 6, 7, 2]
    assert memory.passes == [2, 2]


@pytest.mark.parametrize(("confidence", "tokens"), [(0.0, [3, 4, 5, 6]), (1.0, [5, 0, 3, 6])])
def test_the_threshold_decides_who_drafts(confidence, tokens):
    # Of the small model at 0 after odd tokens the most probable token is by 0.1 the next one.
    drafter = SortedDrafting(length=4, exits=(1, 2), confidence=confidence)
    assert list(drafter.propose(Context.start([1, 2]), memory_of(drafter), 8).tokens) == tokens


def test_drawn_tokens_come_with_the_distribution_of_the_sub_model_that_drew_them():
    small, whole = tables()
    drafter = SortedDrafting(length=3, exits=(1, 2))
    tree = drafter.propose(Context.start([2], Sampling(1.0), seed=1), memory_of(drafter), 8)
    for node, probs in tree.draft_probs.items():
        before = 2 if node < 0 else tree.tokens[node]
        torch.testing.assert_close(probs, (small if before % 2 == 0 else whole)[before].softmax(-1))


def test_greedy_decoding_is_left_as_it_is_whatever_is_rejected():
    target = random_table(SIZE, seed=5)
    requests = [Request(str(first), [first, 2], 40) for first in range(3)]
    plain = {result.id: result.token_ids for result in Engine(MarkovTarget(target)).decode(requests)}
    drafter = SortedDrafting(exits=(1, 2))
    engine = Engine(MarkovTarget(target), drafter, models=Models(SIZE, lambda: Nested(*tables())), in_flight=2)
    assert {result.id: result.token_ids for result in engine.decode(requests)} == plain


def test_sub_models_of_a_trained_draft_have_the_logits_of_training_and_share_its_weights(tmp_path):
    head = SortedDraft(num_layers=2, exits=(1, 2))
    network = made(head)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as stored
    head.save(network, tmp_path, FACTS, {})
    models = Models(FACTS.vocabulary, lambda: load_target(tmp_path, torch.float32), tmp_path)
    memory = SortedDrafting().new_memory(models)
    context = Context.start([5, 900, 17, 4, 33])
    tokens = torch.tensor([context.tokens])
    states = network.model.model(tokens, output_hidden_states=True)
    with torch.no_grad():
        for model, state in zip(memory.models, (states.hidden_states[1], None), strict=True):
            hidden = states.last_hidden_state if state is None else network.model.model.norm(state)
            logits = model.start(context, 1)
            torch.testing.assert_close(logits, network.model.lm_head(hidden)[0, -1], rtol=1e-3, atol=1e-3)
    one, two = (model.target for model in memory.models)
    assert one._decoder.layers[0] is two._decoder.layers[0]
    assert one.token_bytes * 2 == two.token_bytes


def test_a_draft_that_is_not_sorted_drafts_as_a_whole_and_too_many_layers_are_refused():
    folder = resolve("embedded:draft")
    models = Models(FACTS.vocabulary, lambda: load_target(folder, torch.float32), folder)
    assert len(SortedDrafting().new_memory(models).models) == 1
    with pytest.raises(UserError, match="a sub-model of 3 layers is wrong: the model has 2"):
        SortedDrafting(exits=(1, 3)).new_memory(models)


@pytest.mark.parametrize("wrong", [{"length": 0}, {"confidence": 1.5}, {"exits": (2, 1)}])
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SortedDrafting(**wrong)
