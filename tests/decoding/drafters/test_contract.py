"""What every drafter in conf/drafter must do; those with a head on the target have heads/test_contract.py."""

from collections.abc import Hashable

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load, save
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.stop_strings import StopStrings
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.tree import ROOT, DraftSampling
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.acceptance import FILE, AcceptanceHead
from tests.decoding.drafters.heads.untrained import without_target_heads

CONFIGS = without_target_heads()
TEXTS = [
    "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n\n\ndef",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def",
]
GREEDY, WARM = Sampling(), Sampling(temperature=0.8)
NEW = 24
PLACES = (0, 5, 12, 20)


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def drafter(request):
    # As jobs do: else the members of a drafter of several would become configs.
    return instantiate(OmegaConf.load(request.param), _convert_="all")


@pytest.fixture(scope="module")
def prompts():
    tokenizer = Tokenizer.from_file(str(resolve("embedded:target") / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def target():
    return load_target(resolve("embedded:target"), torch.float32)


@pytest.fixture(scope="module")
def models(target, tmp_path_factory):
    """The embedded draft model, and beside it what would be trained for it, untrained."""
    folder = tmp_path_factory.mktemp("draft")
    draft = load_target(resolve("embedded:draft"), torch.float32, keeps_hidden=True)
    torch.manual_seed(0)
    AcceptanceHead(OmegaConf.load(resolve("embedded:draft") / "config.json").hidden_size).save(folder / FILE)
    return Models(target.vocabulary, lambda: draft, folder)


def decoded(target, prompts, drafter=None, memory=None, sampling=GREEDY, in_flight=1):
    """Ids decoded for each prompt. Without gradients, as jobs do it."""
    policy = Fixed(8 if drafter else 0)
    engine = Engine(target, drafter, SampleAndMatch(), memory=memory, policy=policy, in_flight=in_flight)
    requests = [Request(str(index), prompt, NEW, sampling, seed=index) for index, prompt in enumerate(prompts)]
    with torch.no_grad():
        found = {result.id: result.token_ids for result in engine.decode(requests)}
    return [found[request.id] for request in requests]


@pytest.fixture(scope="module")
def plain(target, prompts):
    """What the target says without drafts, by temperature."""
    return {sampling.temperature: decoded(target, prompts, sampling=sampling) for sampling in (GREEDY, WARM)}


@pytest.fixture(scope="module")
def learned(drafter, models, target, prompts):
    """A memory that has seen both prompts and what follows them."""
    memory = drafter.new_memory(models)
    decoded(target, prompts, drafter, memory)
    return memory


def contexts(prompts, plain, sampling):
    """Sequences that have got to some places of what was decoded greedily."""
    return [
        Context.start([*prompt, *tokens[:length]], sampling, seed=length)
        for prompt, tokens in zip(prompts, plain[0.0], strict=True)
        for length in PLACES
    ]


def proposals(drafter, memory, prompts, plain, sampling, budget=8):
    """A tree for each of these sequences, one by one."""
    found = []
    with torch.no_grad():
        for context in contexts(prompts, plain, sampling):
            found.append(drafter.propose(context, memory, budget))
            drafter.end(context, memory)
    return found


def contents(trees):
    return [(list(tree.tokens), list(tree.parents), tree.draft_sampling) for tree in trees]


@pytest.mark.parametrize(
    ("sampling", "in_flight"), [(GREEDY, 1), (GREEDY, 2), (WARM, 2)], ids=["greedy", "two", "two-sampled"]
)
def test_output_is_the_targets_own_token_for_token(drafter, models, target, prompts, plain, sampling, in_flight):
    # With sample-and-match a seed gives the same text whatever is drafted.
    found = decoded(target, prompts, drafter, drafter.new_memory(models), sampling, in_flight)
    assert found == plain[sampling.temperature]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("budget", [1, 20])
def test_trees_are_well_formed_and_within_the_budget(drafter, learned, models, prompts, plain, sampling, budget):
    trees = proposals(drafter, learned, prompts, plain, sampling, budget)
    assert any(len(tree) for tree in trees)
    for tree in trees:
        assert len(tree) <= budget
        assert all(ROOT <= parent < node for node, parent in enumerate(tree.parents))
        assert len(set(zip(tree.parents, tree.tokens, strict=True))) == len(tree), "siblings differ"
        assert all(0 <= token < models.vocabulary for token in tree.tokens)
        assert tree.is_chain or not drafter.chains()
        assert all(isinstance(tree.label(node), Hashable) for node in range(len(tree)))
        if len(tree):
            assert tree.draft_sampling is drafter.draft_sampling(sampling)


def test_what_is_drawn_comes_with_the_distributions_that_it_was_drawn_from(drafter, learned, prompts, plain):
    trees = [tree for tree in proposals(drafter, learned, prompts, plain, WARM) if len(tree)]
    for tree in trees:
        assert (tree.draft_probs is None) == (tree.draft_sampling is DraftSampling.DETERMINISTIC)
        if tree.draft_probs is not None:
            assert set(tree.draft_probs) == set(tree.parents)
            for parent, probs in tree.draft_probs.items():
                torch.testing.assert_close(probs.sum(), torch.tensor(1.0))
                assert all(probs[tree.tokens[child]] > 0 for child in tree.children[parent])
    assert drafter.draft_sampling(GREEDY) is DraftSampling.DETERMINISTIC


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_proposals_repeat_themselves_from_a_seed(drafter, learned, models, target, prompts, plain, sampling):
    memory = drafter.new_memory(models)
    decoded(target, prompts, drafter, memory)
    found = [contents(proposals(drafter, each, prompts, plain, sampling)) for each in (learned, memory)]
    assert found[0] == found[1]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_saved_and_loaded_it_proposes_the_same(drafter, learned, models, prompts, plain, sampling):
    again = drafter.new_memory(models)
    drafter.load(again, load(save(dict(drafter.saved(learned)))))
    expected = contents(proposals(drafter, learned, prompts, plain, sampling))
    assert contents(proposals(drafter, again, prompts, plain, sampling)) == expected


def test_sequences_asked_together_get_what_they_get_alone(drafter, learned, prompts, plain):
    # A draft model's numbers differ in the last bits by the batch; the trees are those of texts without a near tie.
    alone = proposals(drafter, learned, prompts, plain, GREEDY)
    with torch.no_grad():
        together = drafter.propose_all(contexts(prompts, plain, GREEDY), learned, 8)
    assert contents(together) == contents(alone)


@pytest.mark.parametrize(("sampling", "in_flight"), [(GREEDY, 1), (WARM, 2)], ids=["greedy", "two-sampled"])
def test_a_stop_string_ends_what_the_target_says(drafter, models, target, prompts, plain, sampling, in_flight):
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:target"))
    # In the middle of both completions, over the border of two tokens or more.
    expected = plain[sampling.temperature]
    texts = [tokenizer.decode(tokens) for tokens in expected]
    strings = tuple(text[len(text) // 2 : len(text) // 2 + 7] for text in texts)
    stop = StopStrings(strings, tokenizer)
    memory = drafter.new_memory(models)
    # With this verifier a seed gives the same text whatever is drafted.
    verifier = SampleAndMatch()
    engine = Engine(target, drafter, verifier, memory=memory, policy=Fixed(8), in_flight=in_flight, stop_strings=stop)
    requests = [Request(str(index), prompt, NEW, sampling, seed=index) for index, prompt in enumerate(prompts)]
    for result in engine.decode(requests):
        tokens = expected[int(result.id)]
        ends = [n for n in range(1, NEW + 1) if any(string in tokenizer.decode(tokens[:n]) for string in strings)]
        assert result.token_ids == tokens[: ends[0]]
        assert result.ended == "stop"
        assert result.stop_string in strings
        assert stop.cut(texts[int(result.id)]) == stop.cut(tokenizer.decode(result.token_ids))


def test_a_prompt_of_one_token_is_decoded(drafter, models, target, prompts):
    short = [prompt[-1:] for prompt in prompts]
    assert decoded(target, short, drafter, drafter.new_memory(models)) == decoded(target, short)


def test_some_draft_agrees_with_text_that_was_decoded_before(drafter, learned, prompts, plain):
    trees = proposals(drafter, learned, prompts, plain, GREEDY)
    follows = [tokens[length] for tokens in plain[0.0] for length in PLACES]
    firsts = [[tree.tokens[node] for node in tree.children.get(ROOT, ())] for tree in trees]
    assert any(token in first for token, first in zip(follows, firsts, strict=True))
