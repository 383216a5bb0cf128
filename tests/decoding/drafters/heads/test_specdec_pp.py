"""A chain ends behind the first token by which the chance of a rejection exceeds the threshold."""

from dataclasses import replace
from math import log, prod

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.heads.specdec_pp import SpecDecPlusPlus
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from tests.decoding.markov import MarkovTarget, random_table

ACCEPTANCE = [0.9, 0.5, 0.99, 0.8, 0.95, 0.75, 0.6, 0.85]


@pytest.fixture
def folder(tmp_path):
    """A draft model's folder, with a head that reads a token's acceptance from the first number of the hidden state."""
    head = AcceptanceHead(8, blocks=0)
    torch.nn.init.zeros_(head.out.weight)
    torch.nn.init.zeros_(head.out.bias)
    head.out.weight.data[1, 0] = 1.0
    head.save(tmp_path / FILE)
    return tmp_path


def models(table, folder):
    return Models(8, lambda: MarkovTarget(table), folder)


def steady(acceptance):
    """Counts 1, 2, …, 7, 1, … at temperature 0; all tokens have this acceptance."""
    table = torch.zeros(8, 8)
    for token in range(8):
        table[token, token % 7 + 1] = 20.0
    table[:, 0] = log(acceptance / (1 - acceptance))
    return table


def uneven():
    """A random chain whose tokens have the acceptances above. The first token has next to no share of a draw."""
    table = random_table(8, seed=3)
    table[:, 0] = torch.tensor(ACCEPTANCE).logit()
    return table


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        # Of 0.9, 0.81, 0.729, 0.656 the fourth is below 1 - 0.3; the token behind it is drawn by then.
        ({}, 5),
        ({"threshold": 0.2}, 4),
        ({"threshold": 0.05}, 2),
        ({"threshold": 0.0, "min_length": 4}, 4),
        ({"threshold": 0.0, "min_length": 1}, 2),
        ({"threshold": 1.0}, 20),
        ({"threshold": 1.0, "max_length": 6}, 6),
    ],
)
def test_the_chain_ends_where_the_product_of_acceptances_says(folder, settings, length):
    drafter = SpecDecPlusPlus(**settings)
    memory = drafter.new_memory(models(steady(0.9), folder))
    tree = drafter.propose(Context.start([3]), memory, 100)
    assert list(tree.tokens) == [(3 + step) % 7 + 1 for step in range(length)]
    assert tree.is_chain
    # The pass over a token gives its acceptance and the next token: none is run for nothing.
    assert len(memory.target.passes) == length


def test_the_budget_bounds_the_chain(folder):
    drafter = SpecDecPlusPlus(threshold=1.0)
    assert len(drafter.propose(Context.start([3]), drafter.new_memory(models(steady(0.9), folder)), 3)) == 3
    assert len(drafter.propose(Context.start([3]), drafter.new_memory(models(steady(0.9), folder)), 1)) == 1


def test_a_drawn_chain_is_the_start_of_one_of_fixed_length_and_its_last_token_has_no_say(folder):
    drafter, fixed = SpecDecPlusPlus(), DraftModel(length=20)
    memory, its = drafter.new_memory(models(uneven(), folder)), fixed.new_memory(models(uneven(), folder))
    lengths = set()
    for seed in range(40):
        tree = drafter.propose(Context.start([1], Sampling(1.0), seed), memory, 20)
        whole = fixed.propose(Context.start([1], Sampling(1.0), seed), its, 20)
        count = len(tree)
        assert list(tree.tokens) == list(whole.tokens[:count])
        for parent in range(-1, count - 1):
            assert torch.equal(tree.draft_probs[parent], whole.draft_probs[parent])
        # What ends it are the acceptances of the tokens before the last.
        reached = [prod(ACCEPTANCE[token] for token in whole.tokens[:before]) for before in range(20)]
        assert count == next(length for length in range(2, 21) if length == 20 or reached[length - 1] < 0.7)
        lengths.add(count)
    assert len(lengths) > 2


def test_sequences_that_share_passes_get_the_chains_that_they_get_alone(folder):
    drafter = SpecDecPlusPlus()
    alone, together = (drafter.new_memory(models(uneven(), folder)) for _ in range(2))
    starts = [([1, 2, 3], 0), ([5], 1), ([4, 4], 2), ([7, 1], 3)]
    expected = [drafter.propose(Context.start(tokens, Sampling(1.0), seed), alone, 20) for tokens, seed in starts]
    contexts = [Context.start(tokens, Sampling(1.0), seed) for tokens, seed in starts]
    found = drafter.propose_all(contexts, together, 20)
    assert [list(tree.tokens) for tree in found] == [list(tree.tokens) for tree in expected]
    assert len({len(tree) for tree in found}) > 1


def test_greedy_decoding_is_left_as_it_is(folder):
    target = random_table(8, seed=5)
    request = Request("a", [1, 2], 40)
    plain = next(Engine(MarkovTarget(target)).decode([request]))
    engine = Engine(MarkovTarget(target), SpecDecPlusPlus(), models=models(uneven(), folder))
    found = next(engine.decode([request]))
    assert found.token_ids == plain.token_ids
    assert found.stats.num_draft_tokens > 0


@pytest.mark.parametrize("path", ["transformers", "llama"])
def test_the_embedded_draft_model_gives_its_head_the_states_that_it_was_trained_on(path):
    folder = resolve("embedded:draft")
    memory = SpecDecPlusPlus().new_memory(
        Models(4096, lambda: load_target(folder, torch.float32, path=path, keeps_hidden=True), folder)
    )
    context = Context.start(list(range(100, 120)))
    memory.start(context, 2)
    memory.extend(context, [300], [-1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([[*context.tokens, 300]]), output_hidden_states=True).hidden_states[-1]
    # float32 sums in another order.
    assert memory.accepts[id(context)] == pytest.approx(float(memory.head.accepts(states[0, -1])), rel=1e-4)


def test_a_head_elsewhere_is_found_and_a_missing_one_is_named(folder, tmp_path):
    moved = (folder / FILE).rename(tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=r"no acceptance head at .*acceptance_head\.safetensors.*hasten train_drafter"):
        SpecDecPlusPlus().new_memory(models(uneven(), folder))
    SpecDecPlusPlus(head=str(moved)).new_memory(models(uneven(), folder))
    SpecDecPlusPlus(head=str(moved)).new_memory(replace(models(uneven(), folder), draft_path=None))
    with pytest.raises(UserError, match="give head=PATH"):
        SpecDecPlusPlus().new_memory(replace(models(uneven(), folder), draft_path=None))
    with pytest.raises(UserError, match="needs a draft model"):
        SpecDecPlusPlus().new_memory(Models(8))


def test_a_head_for_another_width_is_refused(folder):
    drafter = SpecDecPlusPlus()
    memory = drafter.new_memory(models(random_table(5), folder))
    with pytest.raises(UserError, match="hidden_size=8, and this one has hidden_size=5"):
        drafter.propose(Context.start([1]), memory, 4)


@pytest.mark.parametrize("wrong", [{"threshold": 1.5}, {"min_length": 0}, {"min_length": 30}])
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SpecDecPlusPlus(**wrong)
