"""Drafters with virtual tokens: drafts in use are those of training, and candidates share a pass with them."""

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.drafters.combined.union import Union
from hasten.accel.decoding.drafters.heads.hidden_transfer import HiddenTransferDrafter
from hasten.accel.decoding.drafters.heads.ppd import PpdDrafter
from hasten.accel.decoding.drafters.heads.virtual import SparseTrees, ends, most_probable_paths
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.tree import ROOT
from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.accel.training.heads.draft_head import HeadBatch, load_head
from hasten.accel.training.heads.hidden_transfer import HiddenTransfer
from hasten.accel.training.heads.ppd import ParallelPrompts
from tests.decoding.drafters.heads.untrained import network_of, save_untrained

FOLDER = resolve("embedded:target")
PROMPT, NEW = [320, 17, 900, 4, 55, 1021], 24
RATES = [[0.5, 0.2, 0.1], [0.4, 0.1, 0.05]]


@pytest.fixture(scope="module")
def target():
    return load_target(FOLDER, torch.float32)


@pytest.fixture(scope="module")
def plain(target):
    [result] = Engine(target, policy=Fixed(0)).decode([Request("0", PROMPT, NEW)])
    return result.token_ids


def batch_of(tokens):
    """A window of one document."""
    shape = 1, len(tokens)
    ones = torch.ones(shape, dtype=torch.long)
    return HeadBatch(
        torch.tensor([tokens]),
        torch.zeros(*shape, 0),
        ones[..., None],
        torch.zeros(*shape, 1),
        ones.bool(),
        0 * ones,
        torch.arange(len(tokens))[None],
    )


class Oracle:
    """Drafts the text's own next tokens beside wrong ones, and notes what it observes after each pass."""

    text: tuple[int, ...]
    notes: list

    def _levels(self, context, memory):
        if not context.state.get(self):
            return ()
        rest = self.text[len(context.tokens) :][: len(context.state[self].levels)]
        return [([token + 1, token], [0.5, 0.4]) for token in rest]

    def observe_virtual(self, memory, context, numbers, logits):
        self.notes.append((list(context.tokens), logits.clone()))
        super().observe_virtual(memory, context, numbers, logits)


@dataclass(frozen=True)
class PpdOracle(Oracle, PpdDrafter):
    text: tuple[int, ...] = ()
    notes: list = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class HiddenTransferOracle(Oracle, HiddenTransferDrafter):
    text: tuple[int, ...] = ()
    notes: list = field(default_factory=list, compare=False)


@pytest.mark.parametrize("path", ["llama", "transformers"])
@pytest.mark.parametrize(
    ("oracle", "head"),
    [
        (PpdOracle, ParallelPrompts()),
        (PpdOracle, ParallelPrompts(ensemble=2)),
        (HiddenTransferOracle, HiddenTransfer(enter=(1, 2, 3))),
    ],
    ids=["ppd", "ppd with an ensemble", "hidden transfer"],
)
def test_drafts_in_use_are_those_of_training(plain, tmp_path, oracle, head, path):
    target = load_target(FOLDER, torch.float32, path=path)
    folder = save_untrained(head, tmp_path)
    drafter = oracle(head=str(folder), text=(*PROMPT, *plain))
    models = Models(target.vocabulary, target=target, target_path=FOLDER)
    engine = Engine(target, drafter, models=models, policy=Fixed(12))
    [result] = engine.decode([Request("0", PROMPT, NEW)])
    assert result.token_ids == plain
    assert result.stats.metrics()["mean_acceptance_length"] > 1.8, "drafts of several depths were accepted"
    _, network, _ = load_head(folder, type(head))  # as stored, in bfloat16
    network.borrow(network_of(head))
    depths = set()
    for tokens, logits in drafter.notes:
        positions = len(logits) // network.ensemble
        depths.add(positions)
        # The last token has not run: the virtual tokens hang on the one before it.
        with torch.no_grad():
            trained = network.logits(batch_of(tokens), torch.tensor([[len(tokens) - 2]]))[0, 0, :positions]
        # The target's float32 sums in another order, over logits of about 10.
        found = logits.view(positions, network.ensemble, -1).mean(1)
        torch.testing.assert_close(found, trained, rtol=1e-3, atol=1e-3)
    assert max(depths) == head.depth


def test_a_draft_is_not_used_after_the_text_has_grown_without_virtual_tokens(target, tmp_path):
    drafter = PpdDrafter(head=str(save_untrained(ParallelPrompts(), tmp_path)))
    memory = drafter.new_memory(Models(target.vocabulary, target=target, target_path=FOLDER))
    context = Context.start(PROMPT)
    drafter.observe_virtual(memory, context, [0, 1, 2], torch.randn(3, target.vocabulary))
    assert len(drafter.propose(context, memory, 8))
    context.tokens.append(7)
    assert not len(drafter.propose(context, memory, 8))


def test_paths_are_the_most_probable_ones_of_the_product_of_levels():
    levels = [([7, 8], [0.6, 0.3]), ([9, 5], [0.5, 0.2])]
    nodes = most_probable_paths(levels, 5)
    # 7: 0.6, 8: 0.3, 7 9: 0.3, 8 9: 0.15, 7 5: 0.12, 8 5: 0.06
    assert [(node.token, node.parent) for node in nodes] == [(7, ROOT), (8, ROOT), (9, 0), (9, 1), (5, 0)]
    assert [round(node.value, 3) for node in nodes] == [0.6, 0.3, 0.3, 0.15, 0.12]


def test_an_accepted_path_ends_where_no_child_is_accepted():
    found = ends([ROOT, ROOT, 0], [0.6, 0.3, 0.2])
    assert {node: round(value, 6) for node, value in found.items()} == {ROOT: 0.1, 0: 0.4, 1: 0.3, 2: 0.2}


@pytest.mark.parametrize("ensemble", [1, 2])
@pytest.mark.parametrize("state", [1, 2])
def test_candidates_and_virtual_tokens_share_the_budget_that_gives_most_tokens(state, ensemble):
    budget = 6
    trees = SparseTrees(RATES, ensemble)
    gains = trees.gains(budget)

    def best(count):
        """The most tokens with `count` candidates, over all ways to give each node 0, 1 or 2 positions."""
        nodes = most_probable_paths([(range(3), row) for row in RATES[:state]], count)
        chances = ends([node.parent for node in nodes], [node.value for node in nodes]).values()
        ways = itertools.product(range(len(gains) + 1), repeat=len(nodes) + 1)
        fitting = [way for way in ways if sum(way) * ensemble <= budget - len(nodes)]
        drafts = max(sum(p * sum(gains[:k]) for p, k in zip(chances, way, strict=True)) for way in fitting)
        return sum(node.value for node in nodes) + drafts

    counts = range(budget + 1)
    assert best(trees.candidates(state, budget)) == pytest.approx(max(map(best, counts)))


def test_without_a_draft_all_nodes_are_virtual():
    trees = SparseTrees(RATES, 2)
    assert trees.candidates(0, 8) == 0
    assert trees.placed({ROOT: 1.0}, 8, 8) == [(ROOT, trees.gains(8)[0]), (ROOT, trees.gains(8)[1])]
    assert trees.most_virtual(8) >= 4


def test_a_combined_drafter_refuses_a_member_with_virtual_tokens(target, tmp_path):
    member = replace(PpdDrafter(), head=str(save_untrained(ParallelPrompts(), tmp_path)))
    with pytest.raises(UserError, match="cannot be combined"):
        Union((member,)).new_memory(Models(target.vocabulary, target=target, target_path=FOLDER))
