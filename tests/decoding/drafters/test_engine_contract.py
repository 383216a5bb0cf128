"""What every drafter in conf/drafter must do inside the loop, on targets and draft models whose logits are tables."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load, save

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.model.base import TOGETHER
from hasten.accel.decoding.drafters.retrieval.aded import Aded
from hasten.accel.decoding.drafters.retrieval.stand import Stand
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from hasten.jobs.bench.measurements.markov import chi_square, joint
from tests.decoding.drafters.heads.untrained import without_target_heads
from tests.decoding.markov import MarkovTarget, random_table

CONFIGS = without_target_heads()
GREEDY, WARM = Sampling(), Sampling(temperature=1.0)
SIZE = 6
LONG = 20 * [1, 2, 3, 4, 5, 0, 2] + 20 * [4, 1, 3]  # more tokens than a draft model reads in a pass of drafting


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def drafter(request):
    return instantiate(OmegaConf.load(request.param), _convert_="all")


class Timed(MarkovTarget):
    """A draft model that counts a second for every token of a pass. now: the time."""

    now = 0.0

    def _run(self, slots, starts, ids, positions, allowed, logits):
        self.now += ids.shape[1]
        return super()._run(slots, starts, ids, positions, allowed, logits)


@pytest.fixture
def made(tmp_path):
    """Function that gives a draft model of some rows, and the models of a target with SIZE rows."""

    def make(rows=SIZE, size=SIZE):
        torch.manual_seed(0)
        AcceptanceHead(rows).save(tmp_path / FILE)
        table = random_table(max(rows, size), order=2, scale=2.0)[:rows, :rows, :rows]
        draft = Timed(table + 0.5 * random_table(rows, order=2, seed=1))
        return draft, Models(size, lambda: draft, tmp_path)

    return make


def target(size=SIZE):
    return MarkovTarget(random_table(size, order=2, scale=2.0))


def decoded(engine, requests):
    with torch.no_grad():
        return {result.id: result for result in engine.decode(requests)}


@pytest.mark.parametrize("rows", [SIZE - 2, SIZE + 3])
def test_a_draft_model_with_fewer_or_more_rows_leaves_the_tokens_as_they_are(drafter, made, rows):
    _, models = made(rows)
    requests = [Request(str(number), [number, 3, 2, SIZE - 1, 1], 40) for number in range(SIZE)]
    plain = decoded(Engine(target()), requests)
    found = decoded(Engine(target(), drafter, models=models, in_flight=3), requests)
    assert {key: result.token_ids for key, result in found.items()} == {
        key: result.token_ids for key, result in plain.items()
    }
    assert any(SIZE - 1 in result.token_ids for result in plain.values()), "an id that the smaller draft does not have"
    assert sum(result.stats.num_accepted_draft_tokens for result in found.values()) > 0


@pytest.mark.parametrize("rows", [3, 6])
def test_sampled_tokens_follow_the_target_if_the_draft_model_has_fewer_or_more_rows(drafter, made, rows):
    _, models = made(rows, size=4)
    prompt, count, tokens = [1, 0, 3, 1, 0, 3, 1], 1000, 3
    engine = Engine(target(4), drafter, models=models, policy=Fixed(4), in_flight=50)
    requests = [Request(str(number), prompt, tokens + 1, WARM, seed=number) for number in range(count)]
    found = torch.tensor([result.token_ids[:tokens] for result in decoded(engine, requests).values()])
    counts = (found * torch.tensor([16, 4, 1])).sum(-1).bincount(minlength=64)
    expected = joint(target(4).table, prompt, WARM, tokens).flatten()
    # One of all these tests fails by chance in a thousand runs.
    assert chi_square(counts, expected)[2] > 1e-3 / (2 * len(CONFIGS))


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_prefilled_prompt_is_no_part_of_drafting_and_changes_no_draft(drafter, made, sampling):
    trees = []
    for prefills in (False, True):
        draft, models = made()
        memory = drafter.new_memory(models)
        contexts = [Context.start(LONG[start:], sampling, seed=start) for start in (0, 9)]
        for context in contexts:
            drafter.begin(context, memory)
        with torch.no_grad():
            if prefills:
                drafter.prefill(contexts, memory, 8)
                draft.passes.clear()
            proposed = drafter.propose_all(contexts, memory, 8)
        trees.append([(list(tree.tokens), list(tree.parents), tree.draft_sampling) for tree in proposed])
        if prefills:
            assert all(width <= TOGETHER for _, width in draft.passes)
    assert trees[0] == trees[1]


def test_the_time_of_a_prompt_is_not_that_of_its_first_draft(drafter, made):
    class Noting(Fixed):
        def record_drafting(self, nodes, seconds):
            taken.append(seconds)

    taken = []
    draft, models = made()
    engine = Engine(target(), drafter, models=models, policy=Noting(4), in_flight=2, draft_clock=lambda: draft.now)
    decoded(engine, [Request(str(number), LONG[number:], 12) for number in range(4)])
    assert len(taken) > 4
    assert max(taken) < 2 * TOGETHER, "tokens that the draft model read for a draft"


@pytest.mark.parametrize("in_flight", [1, 3])
def test_nothing_is_drafted_where_no_token_is_left(drafter, made, in_flight, monkeypatch):
    budgets, drafted = [], []

    class Noting(Fixed):
        def budget(self, sequences):
            budgets.append(sequences)
            return super().budget(sequences)

    original = type(drafter).propose_all

    def propose_all(self, contexts, memory, budget):
        if self == drafter:
            drafted.extend(len(context.tokens) - context.prompt_length for context in contexts)
        return original(self, contexts, memory, budget)

    monkeypatch.setattr(type(drafter), "propose_all", propose_all)
    requests = [Request(str(number), [number, 3, 2, 1, 3, 2], new) for number, new in enumerate((1, 2, 5))]
    _, models = made()
    results = decoded(Engine(target(), drafter, models=models, policy=Noting(4), in_flight=in_flight), requests)
    assert [len(results[str(number)].token_ids) for number in range(3)] == [1, 2, 5]
    assert max(drafted) <= 3, "of five tokens the last one is that of the pass"
    alone = in_flight == 1
    # The request for one token has no pass with drafts, those for more have no draft in a pass for the last one.
    assert len(drafted) <= 1 + 4
    assert not alone or len(budgets) == len(drafted)


def test_what_is_forgotten_changes_no_later_draft(drafter, made):
    _, models = made()
    memory, other = drafter.new_memory(models), drafter.new_memory(models)
    kept = [1, 2, 3, 4, 1, 2, 5, 1, 2]
    context = Context.start(kept)
    with torch.no_grad():
        drafter.propose(context, memory, 8)
        context.tokens += [3, 1, 2, 0, 0, 5]
        drafter.propose(context, memory, 8)
        drafter.truncate(context, len(kept))
        context.tokens[len(kept) :] = [5, 1, 2]
        expected = drafter.propose(Context.start([*kept, 5, 1, 2]), other, 8)
        assert drafter.propose(context, memory, 8) == expected


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_the_bound_on_memory_holds_for_the_caches_of_both_models(drafter, made, sampling):
    requests = [Request(str(number), LONG[number:], 20, sampling) for number in range(4)]
    plain = len(LONG) + 20 + 1
    # Enough for two sequences of the target and a part of what two of both models need, of four that are asked for.
    bound = 2 * (plain * 8 + 5 * SIZE * 12) + 2 * plain * 8
    draft, models = made()
    both = target()
    results = decoded(Engine(both, drafter, models=models, policy=Fixed(8), in_flight=4, memory_bytes=bound), requests)
    assert len(results) == 4
    cached = draft.cache_bytes if draft.slots else 0
    assert both.cache_bytes + cached <= bound
    assert bool(cached) == drafter.needs_draft_model


def test_changes_restore_what_was_learned_part_by_part(drafter, made):
    _, models = made()
    memory, again = drafter.new_memory(models), drafter.new_memory(models)
    engine = Engine(target(), drafter, models=models, memory=memory, policy=Fixed(4))
    parts = []
    for number in range(4):
        decoded(engine, [Request(str(number), LONG[:20], 6, WARM, seed=number)])
        parts.append(drafter.changes(memory))
    drafter.load(again, load(save(dict(parts[0]))))
    for part in parts[1:]:
        drafter.update(again, load(save(dict(part))))
    expected, found = drafter.saved(memory), drafter.saved(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert bool(expected) == drafter.learns
    # Without anything new there is no row; with `whole` there are all.
    assert all(part.numel() == 0 for part in drafter.changes(memory).values())
    whole = drafter.changes(memory, whole=True)
    assert all(torch.equal(whole[name], expected[name]) for name in expected)


@pytest.mark.parametrize("made_by", [Aded(max_pairs=5), Stand(max_ngrams=5)], ids=["aded", "stand"])
def test_changes_restore_a_table_that_is_full(made_by, made):
    _, models = made()
    memory, again = made_by.new_memory(models), made_by.new_memory(models)
    engine = Engine(target(), made_by, models=models, memory=memory, policy=Fixed(4))
    for number in range(6):
        decoded(engine, [Request(str(number), [number % SIZE, 1, 2], 3 + number, WARM, seed=number)])
        (made_by.update if number else made_by.load)(again, made_by.changes(memory))
        expected, found = made_by.saved(memory), made_by.saved(again)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
