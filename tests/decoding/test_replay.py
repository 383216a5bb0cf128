import pytest
import torch

from hasten.accel.decoding.drafters.base import Drafter, Models
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.decoding.drafters.retrieval.token_recycling import TokenRecycling
from hasten.accel.decoding.replay import distinct_share, replay
from hasten.accel.decoding.stats import DecodingStats
from hasten.accel.decoding.tree import DraftTree


class CountsOn(Drafter):
    """Says that each token is followed by the next higher one; its memory is a list of what it observed."""

    def propose(self, context, memory, budget):
        last = context.tokens[-1]
        return DraftTree.chain([last + 1 + node for node in range(budget)])

    def observe(self, memory, outcome):
        memory.append(outcome)


class Curious(CountsOn):
    observes = 4


TEXT = [5, 6, 7, 8, 1, 2, 9]


def test_a_text_accepts_the_longest_path_and_gives_the_token_after_it():
    seen = []
    (figures,) = replay(CountsOn(), seen, [(TEXT, 1)], budget=2)
    # 5: 6 and 7 are right, 8 follows. 8: 9 is wrong, 1 follows. 1: 2 is right, and the end follows.
    assert [(list(each.tree.tokens), list(each.path), each.token) for each in seen] == [
        ([6, 7], [0, 1], 8),
        ([9, 10], [], 1),
        ([2], [0], 9),
    ]
    assert figures.num_tokens == 6
    assert figures.num_spec_steps == 3
    assert figures.num_draft_tokens == 5
    assert figures.acceptance_histogram == [1, 1, 1]
    assert figures.acceptance_per_position == [2 / 3, 1 / 3]
    assert figures.drafted_at == [3, 2]
    assert figures.metrics()["mean_acceptance_length"] == 2


def test_a_drafter_that_observes_is_told_the_text_and_nothing_of_what_is_not_in_it():
    seen = []
    replay(Curious(), seen, [(TEXT, 1)], budget=2)
    assert [list(each.tree.tokens) for each in seen] == [[6, 7], [], [2]]
    assert [each.top_tokens.tolist() for each in seen] == [[[6], [7], [8]], [[1]], [[2], [9]]]
    assert all(torch.equal(each.top_probs, torch.ones_like(each.top_tokens, dtype=torch.float32)) for each in seen)


def test_every_sequence_has_figures_of_its_own_and_memory_goes_on():
    loop = [1, 2, 3, 4] * 4
    first, second = replay(PromptLookup(), None, [(loop, 5), (loop[:8], 7)], budget=4)
    assert first.num_tokens == 11
    assert first.metrics()["draft_acceptance_rate"] == 1
    assert second.num_tokens == 1
    drafter = TokenRecycling()
    memory = drafter.new_memory(Models(8))
    cold, warm = replay(drafter, memory, [(loop, 4), (loop, 4)], budget=4)
    assert cold.num_spec_steps > warm.num_spec_steps
    assert DecodingStats.total([cold, warm]).num_tokens == 24


@pytest.mark.parametrize(
    ("sequences", "n", "share"), [([[1, 1, 2], [3]], 1, 3 / 4), ([[1, 1, 1, 1], [1]], 2, 1 / 3), ([[1]], 2, 1.0)]
)
def test_distinct_n_grams_are_counted_in_each_sequence(sequences, n, share):
    assert distinct_share(sequences, n) == share
