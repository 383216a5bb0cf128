"""The first drafter that has a draft gives it; all of them learn."""

from dataclasses import dataclass, field

import pytest
import torch
from hydra.utils import instantiate

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Drafter, Models, Outcome
from hasten.accel.decoding.drafters.combined.first_of import FirstOf
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.drafters.retrieval.token_recycling import TokenRecycling
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.tree import ROOT, DraftKind, DraftSampling, DraftTree
from hasten.accel.errors import UserError


@dataclass(frozen=True)
class Always(Drafter):
    """Proposes tokens drawn in the given way, and writes down what it is asked and told."""

    tokens: tuple[int, ...] = ()
    kind: DraftSampling = DraftSampling.DETERMINISTIC
    observes: int = 0
    needs_draft_model: bool = False
    calls: list = field(default_factory=list, compare=False)

    def draft_sampling(self, sampling):
        return self.kind

    def chains(self):
        return True

    def new_memory(self, models):
        return []

    def begin(self, context, memory):
        memory.append("begin")

    def end(self, context, memory):
        memory.append("end")

    def propose(self, context, memory, budget):
        self.calls.append(context)
        probs = (
            None if self.kind is DraftSampling.DETERMINISTIC else [torch.full((20,), 0.05)] * len(self.tokens[:budget])
        )
        return DraftTree.chain(self.tokens[:budget], probs)

    def observe(self, memory, outcome):
        memory.append(None if outcome.top_tokens is None else tuple(outcome.top_tokens.shape))

    def saved(self, memory):
        return {"calls": torch.tensor([len(memory)])}

    def load(self, memory, tensors):
        memory += ["?"] * int(tensors["calls"])


def test_the_first_draft_that_is_not_empty_is_taken_sequence_by_sequence():
    drafter = FirstOf([PromptLookup(), Always((7, 8))])
    memory = drafter.new_memory(Models(20))
    repeated, new = Context.start([1, 2, 3, 1, 2]), Context.start([1, 2, 3, 4])
    trees = drafter.propose_all([repeated, new], memory, 2)
    assert [list(tree.tokens) for tree in trees] == [[3, 1], [7, 8]]
    assert drafter.drafters[1].calls == [new]
    assert not len(FirstOf([Always(), Always()]).propose(new, ([], []), 4))


def test_members_learn_from_every_draft_with_their_own_number_of_ids():
    drafter = FirstOf([Always((1,)), Always((2,), observes=3), Always((3,), observes=5)])
    assert drafter.observes == 5
    memory, context = drafter.new_memory(Models(20)), Context.start([1])
    drafter.begin(context, memory)
    top = torch.arange(10).view(2, 5)
    drafter.observe(memory, Outcome(context, DraftTree([1], [ROOT]), [], 4, top, top.float()))
    drafter.end(context, memory)
    assert memory == (["begin", None, "end"], ["begin", (2, 3), "end"], ["begin", (2, 5), "end"])


def test_members_are_saved_and_loaded_under_their_place():
    drafter = FirstOf([Always(), TokenRecycling(), Always()])
    memory = drafter.new_memory(Models(6))
    memory[2].append("begin")
    saved = drafter.saved(memory)
    assert set(saved) == {"0.calls", "1.successors", "2.calls"}
    again = drafter.new_memory(Models(6))
    drafter.load(again, saved)
    assert (len(again[0]), again[1], len(again[2])) == (0, memory[1], 1)


def test_it_needs_a_draft_model_if_a_member_does_and_drafts_chains_if_all_do():
    assert FirstOf([Always(), Always(needs_draft_model=True)]).needs_draft_model
    assert not FirstOf([Always()]).needs_draft_model
    assert FirstOf([Always(), PromptLookup()]).chains()
    assert not FirstOf([Always(), TokenRecycling()]).chains()


def test_a_draft_is_of_the_kind_of_the_member_that_proposed_it():
    sampled = Always((7,), DraftSampling.INDEPENDENT)
    mixed = FirstOf([PromptLookup(), sampled])
    kinds = {DraftKind(kind, True) for kind in (DraftSampling.DETERMINISTIC, DraftSampling.INDEPENDENT)}
    assert mixed.kinds(Sampling(1.0)) == kinds
    tree = mixed.propose(Context.start([1], Sampling(1.0)), (None, []), 4)
    assert (list(tree.tokens), tree.draft_sampling) == ([7], DraftSampling.INDEPENDENT)
    assert tree.draft_probs is not None
    tree = mixed.propose(Context.start([1, 2, 1], Sampling(1.0)), (None, []), 1)
    assert (list(tree.tokens), tree.draft_sampling) == ([2], DraftSampling.DETERMINISTIC)
    alike = FirstOf([sampled, sampled])
    assert alike.draft_sampling(Sampling(1.0)) is DraftSampling.INDEPENDENT
    assert alike.propose(Context.start([1], Sampling(1.0)), ([], []), 4).draft_probs is not None


def test_a_config_gives_its_members_as_a_list():
    path = "hasten.accel.decoding.drafters"
    members = [
        {"_target_": f"{path}.retrieval.prompt_lookup.PromptLookup"},
        {"_target_": f"{path}.retrieval.aded.Aded", "search": "mcts"},
    ]
    config = {"_target_": f"{path}.combined.first_of.FirstOf", "drafters": members}
    drafter = instantiate(config, _convert_="all")
    assert isinstance(drafter.drafters, tuple)
    assert drafter.drafters[1].search == "mcts"
    assert hash(drafter) == hash(instantiate(config, _convert_="all"))


@pytest.mark.parametrize("drafters", [[], ["prompt_lookup"]])
def test_anything_but_drafters_is_refused(drafters):
    with pytest.raises(UserError, match="must be a list of one or more drafters"):
        FirstOf(drafters)
