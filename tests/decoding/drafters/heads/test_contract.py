"""What every drafter with a head on the target must do, with untrained heads on the embedded target."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from tests.decoding.drafters.heads.untrained import all_heads, save_untrained, with_target_heads

TEXTS = [
    "def total(values):\n    result = 0\n    for value in",
    "class Point:\n    def __init__(self, x, y):\n",
    "import",
]
GREEDY, WARM = Sampling(), Sampling(temperature=0.8)
NEW = 16
# Drafts depend on the target's states, whatever computed them; outputs are compared on both targets.
ONE_TARGET = pytest.mark.parametrize("target", ["llama"], indirect=True)


@pytest.fixture(scope="module", params=with_target_heads(), ids=lambda path: path.stem)
def drafter(request, tmp_path_factory):
    made = instantiate(OmegaConf.load(request.param), _convert_="all")
    head = all_heads()[made.head_type.drafter]
    # An untrained head has no confidence to go on with.
    return replace(made, head=str(save_untrained(head, tmp_path_factory.mktemp("head"))), min_reach=0.0)


@cache
def loaded(path):
    return load_target(resolve("embedded:target"), torch.float32, path=path)


@pytest.fixture(scope="module", params=["llama", "transformers"])
def target(request):
    return loaded(request.param)


@cache
def requests_of(sampling):
    tokenizer = Tokenizer.from_file(str(resolve("embedded:target") / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    return [Request(str(number), prompt, NEW, sampling, seed=number) for number, prompt in enumerate(prompts)]


@cache
def plain(target, sampling):
    """What the target says without drafts, by the request's id."""
    return {result.id: result.token_ids for result in Engine(target, policy=Fixed(0)).decode(requests_of(sampling))}


def models(target):
    return Models(target.vocabulary, target=target, target_path=resolve("embedded:target"))


@pytest.mark.parametrize(("sampling", "in_flight"), [(GREEDY, 1), (GREEDY, 3), (WARM, 2)])
def test_output_is_the_targets_own_token_for_token(drafter, target, sampling, in_flight):
    engine = Engine(target, drafter, models=models(target), policy=Fixed(8), in_flight=in_flight)
    found = {result.id: result.token_ids for result in engine.decode(requests_of(sampling))}
    assert found == plain(target, sampling)


@ONE_TARGET
@pytest.mark.parametrize(("tree", "budget"), [("dynamic", 1), ("static", 6), ("dynamic", 20), ("static", 20)])
def test_trees_are_within_the_budget_and_well_formed(drafter, target, tree, budget):
    trees = []

    class Noting(Fixed):
        def select(self, proposed, sequences, whole):
            trees.extend(proposed)
            return list(proposed)

    chosen = replace(drafter, tree=tree)
    engine = Engine(target, chosen, models=models(target), policy=Noting(budget), in_flight=3)
    list(engine.decode(requests_of(GREEDY)))
    assert any(len(each) for each in trees)
    for each in trees:
        assert len(each) <= budget
        assert all(ROOT <= parent < node for node, parent in enumerate(each.parents))
        assert len(set(zip(each.parents, each.tokens, strict=True))) == len(each), "siblings differ"


def test_sequences_drafted_together_get_what_they_get_alone(drafter, target):
    def trees(in_flight):
        found = []

        class Noting(Fixed):
            def select(self, proposed, sequences, whole):
                found.extend((tuple(tree.tokens), tuple(tree.parents)) for tree in proposed)
                return list(proposed)

        engine = Engine(target, drafter, models=models(target), policy=Noting(6), in_flight=in_flight)
        list(engine.decode(requests_of(GREEDY)))
        return sorted(found)

    assert trees(3) == trees(1)


@ONE_TARGET
@pytest.mark.parametrize("min_reach", [0.0, 1.0])
def test_prompts_that_are_read_before_drafts_change_none(drafter, target, monkeypatch, min_reach):
    def trees(many):
        found = []

        class Noting(Fixed):
            def select(self, proposed, sequences, whole):
                found.append(([list(tree.tokens) for tree in proposed], [list(tree.parents) for tree in proposed]))
                return [tree.first(0) for tree in proposed]

        monkeypatch.setattr("hasten.accel.decoding.drafters.heads.base._MANY", many)
        chosen = replace(drafter, min_reach=min_reach)
        engine = Engine(target, chosen, models=models(target), policy=Noting(6), in_flight=3)
        list(engine.decode(requests_of(GREEDY)))
        return found

    assert trees(2) == trees(1000)


@ONE_TARGET
def test_a_level_that_is_never_reached_is_not_drafted(drafter, target):
    def deepest(min_reach):
        depths = []

        class Noting(Fixed):
            def select(self, proposed, sequences, whole):
                depths.extend(max(tree.depths, default=0) for tree in proposed)
                return list(proposed)

        engine = Engine(target, replace(drafter, min_reach=min_reach), models=models(target), policy=Noting(12))
        list(engine.decode(requests_of(GREEDY)))
        return max(depths)

    if not drafter.virtual_tokens(drafter.new_memory(models(target))):  # those draft all levels in the target's pass
        assert deepest(1.0) == 1 < deepest(0.0)


def test_a_head_of_another_target_is_refused_with_what_differs(drafter, target):
    with pytest.raises(UserError, match="hidden_size"):
        drafter.new_memory(Models(4096, target_path=resolve("embedded:draft")))


def test_a_folder_without_a_head_is_refused(drafter, tmp_path):
    with pytest.raises(UserError, match="hasten train"):
        replace(drafter, head=str(tmp_path)).new_memory(Models(4096, target_path=resolve("embedded:target")))
