"""The loop with drafts that end a sequence, are drawn, come from several drafters or are for sliding windows."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch

from hasten.accel.decoding.drafters.base import Drafter, Models
from hasten.accel.decoding.drafters.combined.first_of import FirstOf
from hasten.accel.decoding.drafters.combined.union import Union
from hasten.accel.decoding.drafters.model.draft_model import DraftModel
from hasten.accel.decoding.drafters.model.dyspec import DySpec
from hasten.accel.decoding.drafters.model.spectr import SpecTr
from hasten.accel.decoding.drafters.retrieval.blended_ngrams import BlendedNGrams
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.drafters.retrieval.stand import Stand
from hasten.accel.decoding.drafters.retrieval.token_recycling import TokenRecycling
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.adaptive import Adaptive
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.lengths.timing import PassCosts
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.targets.transformers import TransformersTarget
from hasten.accel.decoding.tree import DraftTree
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.jobs.bench.measurements.markov import chi_square, joint
from tests.decoding.markov import MarkovTarget, random_table
from tests.models import tiny


def decoded(engine, requests):
    return {result.id: result for result in engine.decode(requests)}


@dataclass(frozen=True)
class Counting(Drafter):
    """Drafts the numbers that follow. seen: outcomes that it observed."""

    seen: list = field(default_factory=list, hash=False, compare=False)
    observes: ClassVar[int] = 1

    def propose(self, context, memory, budget):
        return DraftTree.chain([(context.tokens[-1] + count) % 10 for count in range(1, budget + 1)])

    def observe(self, memory, outcome):
        self.seen.append(outcome)


def test_nodes_behind_the_end_of_a_sequence_are_not_accepted():
    table = torch.zeros(10, 10)
    for token in range(10):
        table[token, (token + 1) % 10] = 10.0
    policy, drafter = Adaptive().start(lambda: PassCosts({1: {1: 1.0, 32: 1.0}}), 6), Counting()
    engine = Engine(MarkovTarget(table), drafter, policy=policy, stop=[4, 5])
    result = decoded(engine, [Request("0", [1], 50)])["0"]
    assert (result.token_ids, result.ended) == ([2, 3, 4], "stop")
    stats = result.stats
    # 2, 3 and 4 were drafted and accepted; 5, 6 and 7 stand behind the end.
    assert (stats.num_tokens, stats.num_spec_steps, stats.num_draft_tokens) == (3, 1, 6)
    assert (stats.num_accepted_draft_tokens, stats.accepted_at, stats.histogram) == (3, [1, 1, 1], {3: 1})
    assert stats.metrics()["mean_acceptance_length"] == 3
    [outcome] = drafter.seen
    assert outcome.committed == [2, 3, 4]
    assert outcome.decided == [-1, 0, 1]
    # What follows the end is no observation of acceptance, neither a good nor a bad one.
    seen = policy._acceptance._rates
    assert {label: rate.seen - 2 for label, rate in seen.items() if rate.seen > 2} == {
        (1, 0): 1,
        (2, 0): 1,
        (3, 0): 1,
    }


def test_a_stop_token_after_the_accepted_path_is_the_pass_own_token():
    table = torch.zeros(10, 10)
    for token in range(10):
        table[token, (token + 1) % 10] = 10.0
    stats = decoded(Engine(MarkovTarget(table), Counting(), policy=Fixed(2), stop=[4]), [Request("0", [1], 50)])[
        "0"
    ].stats
    assert (stats.num_tokens, stats.num_spec_steps, stats.num_accepted_draft_tokens) == (3, 1, 2)


def test_a_probe_drafts_for_one_sequence_and_changes_no_token():
    drafted = []

    @dataclass(frozen=True)
    class Noting(Counting):
        def propose_all(self, contexts, memory, budget):
            drafted.append(len(contexts))
            return super().propose_all(contexts, memory, budget)

    class Probing(Fixed):
        def probes(self):
            return len(drafted) % 2 == 1

        def select(self, trees, sequences, whole):
            assert len(trees) == drafted[-1] <= sequences
            return list(trees)

    table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    requests = [Request(str(number), [number], 12) for number in range(3)]
    plain = decoded(Engine(MarkovTarget(table), policy=Fixed(0), in_flight=3), requests)
    found = decoded(Engine(MarkovTarget(table), Noting(), policy=Probing(1), in_flight=3), requests[:3])
    assert {name: result.token_ids for name, result in found.items()} == {
        name: result.token_ids for name, result in plain.items()
    }
    assert drafted[:4] == [3, 1, 3, 1]


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3_text"])
def test_drafts_for_a_model_with_sliding_windows_leave_its_tokens_as_they_are(family, in_flight):
    model = tiny.build(family)
    prompts = [[5, 6, 7, 8, 5, 6] * 3, [9, 3, 9, 3, 4] * 4]  # longer than the window
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        expected.append(out[0, len(prompt) :].tolist())
    requests = [Request(str(number), prompt, 20) for number, prompt in enumerate(prompts)]
    for drafter in (TokenRecycling(), PromptLookup(min_ngram=1)):
        models = Models(tiny.VOCABULARY)
        results = decoded(Engine(TransformersTarget(model), drafter, models=models, in_flight=in_flight), requests)
        assert [results[request.id].token_ids for request in requests] == expected
        assert sum(result.stats.num_draft_tokens for result in results.values()) > 0


@pytest.mark.parametrize("members", [(PromptLookup(), DraftModel()), (DraftModel(length=2), DySpec())])
@pytest.mark.parametrize("combined", [FirstOf, Union])
def test_combined_drafters_of_several_kinds_are_lossless(combined, members):
    tables = [random_table(4, order=2, scale=2.0), random_table(4, order=2, scale=2.0) + 0.5 * random_table(4, 2, 1)]
    prompt, count, sampling = [1, 0, 3, 1, 0, 3, 1], 2000, Sampling(1.0)
    models = Models(4, lambda: MarkovTarget(tables[1]))
    engine = Engine(MarkovTarget(tables[0]), combined(members), models=models, policy=Fixed(4), in_flight=50)
    requests = [Request(str(number), prompt, 4, sampling, seed=number) for number in range(count)]
    tokens = torch.tensor([result.token_ids[:3] for result in decoded(engine, requests).values()])
    counts = (tokens * torch.tensor([16, 4, 1])).sum(-1).bincount(minlength=64)
    assert chi_square(counts, joint(tables[0], prompt, sampling, 3).flatten())[2] > 1e-4


def tokens_per_pass(verifier, drafter):
    """Of a draft model that is close to a target over 50 tokens, at temperature 1."""
    table = random_table(50, scale=2.0)
    models = Models(50, lambda: MarkovTarget(table + 0.3 * random_table(50, seed=1)))
    engine = Engine(MarkovTarget(table), drafter, verifier, models=models, policy=Fixed(6), in_flight=20)
    requests = [Request(str(number), [number, 1], 40, Sampling(1.0), seed=number) for number in range(20)]
    return DecodingStats.total(result.stats for result in decoded(engine, requests).values()).metrics()[
        "mean_acceptance_length"
    ]


@pytest.mark.parametrize("drafter", [DraftModel(length=6), SpecTr(paths=2, length=3), DySpec()], ids=repr)
def test_the_default_verifier_accepts_more_than_sample_and_match_of_what_is_drawn(drafter):
    assert tokens_per_pass(None, drafter) > 1.1 * tokens_per_pass(SampleAndMatch(), drafter)


@dataclass(frozen=True)
class Drawing(DraftModel):
    """Draws, whatever the verifier reads."""

    def propose_all(self, contexts, memory, budget):
        for context in contexts:
            context.draws = True
        return super().propose_all(contexts, memory, budget)


def test_for_sample_and_match_drafters_propose_their_most_probable_tokens():
    assert tokens_per_pass(SampleAndMatch(), DraftModel()) > 1.1 * tokens_per_pass(SampleAndMatch(), Drawing())


@dataclass(frozen=True)
class Reader(Counting):
    """Observes the target after the last six tokens of a prompt. read: (start, top tokens) of every part."""

    read: list = field(default_factory=list, hash=False, compare=False)
    observes_prompt: ClassVar[int] = 6

    def observe_prompt(self, memory, context, start, top_tokens, top_probs):
        self.read.append((start, top_tokens.tolist(), top_probs.tolist()))


@pytest.mark.parametrize("nodes", [2, 8])
def test_a_drafter_observes_the_target_after_the_end_of_a_prompt(nodes):
    prompt, new = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], 24
    table = random_table(10)
    plain = decoded(Engine(MarkovTarget(table)), [Request("0", prompt, new)])["0"]
    drafter = Reader()
    found = decoded(Engine(MarkovTarget(table), drafter, policy=Fixed(nodes)), [Request("0", prompt, new)])["0"]
    assert found.token_ids == plain.token_ids
    starts = [start for start, _, _ in drafter.read]
    # No more logits at once than a pass of decoding has.
    assert starts == ([3, 6] if nodes == 2 else [3])
    ids = [row for _, rows, _ in drafter.read for row in rows]
    probs = [prob for _, _, rows in drafter.read for [prob] in rows]
    # The last token of the prompt is the root of the first tree, and is observed with it.
    assert ids == [[int(table[token].argmax())] for token in prompt[3:9]]
    assert probs == pytest.approx([float(table[token].softmax(-1).max()) for token in prompt[3:9]])


def test_a_short_completion_observes_less_of_the_prompt_and_a_length_can_refuse():
    class Refusing(Fixed):
        def observes_prompt(self, sequences):
            return False

    for policy, new, expected in ((Fixed(8), 8, [7]), (Fixed(8), 3, []), (Refusing(8), 24, [])):
        drafter = Reader()
        decoded(Engine(MarkovTarget(random_table(10)), drafter, policy=policy), [Request("0", list(range(10)), new)])
        assert [start for start, _, _ in drafter.read] == expected


@pytest.mark.parametrize(
    "drafter", [TokenRecycling(prompt_tokens=64), Stand(), BlendedNGrams(learns_prompt=False, prompt_tokens=64)]
)
def test_the_first_draft_comes_from_what_the_target_said_about_the_prompt(drafter):
    table = torch.zeros(10, 10)
    for token in range(10):
        table[token, (token + 1) % 10] = 10.0
    # Each token of the prompt is followed by another one than the target would have given.
    prompt = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9, 0]
    passes = {}
    for used in (drafter, replace(drafter, prompt_tokens=0)):
        result = decoded(Engine(MarkovTarget(table), used, policy=Fixed(5)), [Request("0", prompt, 44)])["0"]
        assert result.token_ids == [token % 10 for token in range(1, 45)]
        passes[used.prompt_tokens] = result.stats.num_spec_steps
    # With the prompt all tokens are known from the first pass on, without it only after the first round.
    assert passes[drafter.prompt_tokens] <= 44 / 2 < passes[0] + 10
    assert passes[drafter.prompt_tokens] < passes[0]
