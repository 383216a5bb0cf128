"""Blended n-grams interpolate the newest probabilities after n-grams of all lengths."""

import pytest
import torch

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.base import Models, Outcome
from hasten.accel.decoding.drafters.retrieval.blended_ngrams import BlendedNGrams
from hasten.accel.decoding.tree import ROOT, DraftTree
from hasten.accel.errors import UserError


def learned(drafter, rows):
    """A memory with the target's probabilities after sequences of tokens."""
    memory = drafter.new_memory(Models(50))
    for tokens, probs in rows:
        ids, values = torch.tensor([list(probs)]), torch.tensor([list(probs.values())])
        drafter.observe(memory, Outcome(Context.start(list(tokens)), DraftTree(), [], 0, ids, values))
    return memory


def test_shorter_ngrams_share_what_longer_ones_leave():
    drafter = BlendedNGrams(max_ngram=2, concentration=1.0)
    # (1, 2) was followed by 5 or 6; after another token 2 was followed by 6 or 7, which is the newest row of (2,).
    memory = learned(drafter, [((1, 2), {5: 0.8, 6: 0.2}), ((9, 2), {6: 0.6, 7: 0.4})])
    blended = dict(drafter.blended(memory, (1, 2)))
    assert blended == pytest.approx({5: 0.4, 6: 0.1 + 0.15, 7: 0.1})
    # Nothing is known of (8, 2), and the single token has one half of all.
    assert dict(drafter.blended(memory, (8, 2))) == pytest.approx({6: 0.3, 7: 0.2})
    assert not drafter.blended(memory, (2, 8))


def test_the_newest_probabilities_replace_earlier_ones_and_can_be_averaged():
    rows = [((1,), {5: 1.0}), ((1,), {6: 1.0})]
    for share, expected in ((1.0, {6: 0.5}), (0.5, {5: 1 / 3, 6: 1 / 3}), (0.0, {5: 1 / 3, 6: 1 / 3})):
        drafter = BlendedNGrams(newest_share=share)
        assert dict(drafter.blended(learned(drafter, rows), (1,))) == pytest.approx(expected)
    third = [*rows, ((1,), {6: 1.0})]
    # Two observations at least are averaged with 0.5: the third has half of the weight, and 0 weighs all alike.
    for share, expected in ((0.5, {5: 0.25, 6: 0.75}), (0.0, {5: 1 / 3, 6: 2 / 3})):
        drafter = BlendedNGrams(newest_share=share)
        found = drafter.blended(learned(drafter, third), (1,))
        total = sum(prob for _, prob in found)
        assert {token: prob / total for token, prob in found} == pytest.approx(expected)


def test_the_tree_has_the_most_probable_paths_and_none_below_the_least_probability():
    rows = [((1,), {2: 0.9, 3: 0.1}), ((2,), {4: 0.6, 5: 0.4}), ((3,), {6: 1.0})]
    drafter = BlendedNGrams(max_ngram=1, concentration=1e-9, min_probability=0.0)
    memory = learned(drafter, rows)
    # Paths: 2 has 0.9, then 4 below it 0.54, 5 below it 0.36, then 3 and 6 below it 0.1.
    tree = drafter.propose(Context.start([1]), memory, 5)
    assert (list(tree.tokens), list(tree.parents)) == ([2, 4, 5, 3, 6], [ROOT, 0, 0, ROOT, 3])
    cut = BlendedNGrams(max_ngram=1, concentration=1e-9, min_probability=0.3).propose(Context.start([1]), memory, 5)
    assert list(cut.tokens) == [2, 4, 5]
    flat = BlendedNGrams(max_ngram=1, concentration=1e-9, max_depth=1).propose(Context.start([1]), memory, 5)
    assert list(flat.tokens) == [2, 3]


def test_a_passage_of_the_prompt_is_copied():
    drafter, prompt = BlendedNGrams(), [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    memory = drafter.new_memory(Models(50))
    context = Context.start(prompt)
    drafter.begin(context, memory)
    assert list(drafter.propose(context, memory, 5).tokens) == [4, 5, 6, 7, 8]
    without = BlendedNGrams(learns_prompt=False)
    memory = without.new_memory(Models(50))
    without.begin(context, memory)
    assert not len(without.propose(context, memory, 5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"concentration": 0.0},
        {"min_probability": 1.0},
        {"max_depth": 0},
        {"newest_share": 1.5},
        {"prompt_tokens": -1},
        {"max_ngrams": 0},
        {"min_ngram": 0},
    ],
)
def test_a_wrong_hyper_parameter_is_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        BlendedNGrams(**wrong)
