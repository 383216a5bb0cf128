"""The loop, on the embedded target: what comes out is the target's own, whatever is drafted."""

from dataclasses import dataclass
from time import perf_counter, sleep

import pytest
import torch

from hasten.accel.decoding.drafters.base import Drafter
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.adaptive import Adaptive
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.lengths.timing import measure_costs
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.stop_strings import StopStrings
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from tests.decoding.markov import MarkovTarget

PROMPTS = [
    "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write(path",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def",
    "for name in names:\n    print(name)\n",
]
NEW = 40


@dataclass(frozen=True)
class Bush(Drafter):
    """A wide tree of what stood behind each earlier occurrence of the last token, right or wrong."""

    def propose(self, context, memory, budget):
        tokens = context.tokens
        found = [tokens[at + 1 : at + 4] for at in range(len(tokens) - 1) if tokens[at] == tokens[-1]]
        ids, parents, known = [], [], {}
        for chain in found:
            above = ROOT
            for token in chain:
                if (above, token) not in known and len(ids) < budget:
                    known[above, token] = len(ids)
                    ids.append(token)
                    parents.append(above)
                if (above, token) not in known:
                    break
                above = known[above, token]
        return DraftTree(ids, parents)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve("embedded:target"))


@pytest.fixture(scope="module")
def requests(tokenizer):
    return [Request(str(index), tokenizer(text)["input_ids"], NEW) for index, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def expected(requests):
    """What transformers' own greedy decoding gives."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve("embedded:target"), dtype=torch.float32)
    found = {}
    for request in requests:
        ids = torch.tensor([request.tokens])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        found[request.id] = out[0, ids.shape[1] :].tolist()
    return found


@pytest.fixture(scope="module", params=["transformers", "llama"])
def target(request):
    return load_target(resolve("embedded:target"), torch.float32, path=request.param)


def decoded(engine, requests):
    return {result.id: result for result in engine.decode(requests)}


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("drafter", [None, PromptLookup(), Bush()], ids=["plain", "chain", "tree"])
def test_greedy_tokens_are_those_of_generate(target, requests, expected, drafter, in_flight):
    results = decoded(Engine(target, drafter, in_flight=in_flight), requests)
    assert {name: result.token_ids for name, result in results.items()} == expected
    if drafter is not None:
        assert sum(result.stats.num_accepted_draft_tokens for result in results.values()) > 0


def test_sizing_by_measurement_changes_no_token(target, requests, expected):
    policy = Adaptive().start(lambda: measure_costs(target, [1, 4, 8], 2), 8)
    results = decoded(Engine(target, Bush(), policy=policy, in_flight=2), requests)
    assert {name: result.token_ids for name, result in results.items()} == expected


def test_a_seed_gives_one_text_whatever_is_drafted(target, requests):
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1)
    asked = [Request(each.id, each.tokens, NEW, sampling, seed=3) for each in requests]
    texts = [
        {name: result.token_ids for name, result in decoded(engine, asked).items()}
        for engine in (Engine(target), Engine(target, Bush(), in_flight=3), Engine(target, PromptLookup()))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_stop_token_ends_a_sequence_inside_an_accepted_path(target, requests, expected):
    request = requests[0]
    engine = Engine(target, PromptLookup())
    stats = decoded(engine, [request])["0"].stats
    assert stats.num_accepted_draft_tokens > 0
    for stop in set(expected["0"]):
        result = decoded(Engine(target, PromptLookup(), stop=[stop]), [request])["0"]
        assert result.token_ids == expected["0"][: expected["0"].index(stop) + 1]
        assert result.ended == "stop"


def test_a_requests_own_stop_token_ends_it_alone(target, requests, expected):
    stop = expected["0"][NEW // 2]
    asked = [Request("0", requests[0].tokens, NEW, stop=(stop,)), requests[1]]
    results = decoded(Engine(target, PromptLookup(), in_flight=2), asked)
    assert results["0"].token_ids == expected["0"][: expected["0"].index(stop) + 1]
    assert results["1"].token_ids == expected["1"]


def test_a_stop_string_changes_no_token_before_it(target, requests, expected, tokenizer):
    text = tokenizer.decode(expected["0"])
    for start in range(0, len(text) - 5, 5):
        stop = StopStrings((text[start : start + 5],), tokenizer)
        results = [
            decoded(Engine(target, drafter, stop_strings=stop), [requests[0]])["0"] for drafter in (None, Bush())
        ]
        assert results[0].token_ids == results[1].token_ids == expected["0"][: len(results[0].token_ids)]
        before = text.partition(stop.strings[0])[0]
        assert stop.cut(tokenizer.decode(results[0].token_ids)) == before
        assert len(tokenizer.decode(results[0].token_ids[:-1])) < len(before) + 5  # the last token completed it
        assert results[0].stop_string == stop.strings[0]


def test_never_more_tokens_than_asked_for(target, requests, expected):
    for count in range(1, 12):
        asked = Request("0", requests[0].tokens, count)
        result = decoded(Engine(target, PromptLookup()), [asked])["0"]
        assert result.token_ids == expected["0"][:count]
        assert result.ended == "length"


def test_what_is_streamed_is_the_result(target, requests, expected):
    streamed = {}
    engine = Engine(
        target, PromptLookup(), in_flight=2, on_tokens=lambda name, new: streamed.setdefault(name, []).extend(new)
    )
    decoded(engine, requests)
    assert streamed == expected


def test_a_bound_on_memory_cuts_trees_and_then_sequences(requests, expected):
    target = load_target(resolve("embedded:target"), torch.float32, path="llama")
    longest = max(len(request.tokens) for request in requests) + NEW
    bytes_of_one = (longest + 5) * target.token_bytes + 5 * target.vocabulary * 12
    engine = Engine(target, Bush(), policy=Fixed(32), in_flight=3, memory_bytes=2 * bytes_of_one)
    results = decoded(engine, requests)
    assert {name: result.token_ids for name, result in results.items()} == expected
    assert target.slots == 2
    assert target.capacity == longest + 5
    with pytest.raises(UserError, match="memory_bytes=1000 is too little"):
        decoded(Engine(target, memory_bytes=1000), requests)


@dataclass(frozen=True)
class Waiting(Drafter):
    """Takes 10 ms in which this process computes nothing."""

    def propose(self, context, memory, budget):
        sleep(0.01)
        return DraftTree()


def test_drafting_is_timed_by_the_clock_that_was_passed():
    class Noting(Fixed):
        def record_drafting(self, nodes, seconds):
            taken.append(seconds)

    taken = []
    torch.set_num_threads(1)
    target = MarkovTarget(torch.zeros(3, 3))
    decoded(Engine(target, Waiting(), policy=Noting(2), draft_clock=perf_counter), [Request("0", [1], 3)])
    assert len(taken) == 3
    assert min(taken) >= 0.01


def test_prompts_that_cannot_be_decoded_are_named(target):
    with pytest.raises(UserError, match="prompt a has no tokens"):
        decoded(Engine(target), [Request("a", [])])
    with pytest.raises(UserError, match=r"prompt b has 2 tokens, and with max_new_tokens=\d+ it is longer than"):
        decoded(Engine(target), [Request("b", [1, 2], target.max_length)])


def test_figures_add_up(target, requests):
    results = decoded(Engine(target, PromptLookup()), requests)
    for result in results.values():
        stats = result.stats
        assert stats.num_tokens == len(result.token_ids)
        assert sum(stats.histogram.values()) == stats.num_spec_steps
        accepted = sum(count * passes for count, passes in stats.histogram.items())
        assert accepted == stats.num_accepted_draft_tokens
        # Every pass gives one token more than it accepts; the last one may have been cut.
        assert stats.num_tokens <= stats.num_spec_steps + accepted
        assert stats.accepted_at[0] == sum(passes for count, passes in stats.histogram.items() if count)


def test_a_reduced_type_differs_by_ties_alone(requests):
    from hasten.accel.decoding.ties import check_ties

    exact = load_target(resolve("embedded:target"), torch.float32)
    reduced = load_target(resolve("embedded:target"), torch.bfloat16)
    results = decoded(Engine(reduced, Bush()), requests)
    for request in requests:
        found = check_ties(exact, request.tokens, results[request.id].token_ids, torch.bfloat16)
        assert found.faults == 0
        wrong = [*results[request.id].token_ids[:-1], 4000]
        assert check_ties(exact, request.tokens, wrong, torch.bfloat16).faults == 1
