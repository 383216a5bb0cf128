"""Prompt lookup copies what followed the latest occurrence of the longest repeated suffix."""

import pytest

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.retrieval.prompt_lookup import PromptLookup
from hasten.accel.errors import UserError


def drafted(tokens, budget=8, **fields):
    return list(PromptLookup(**fields).propose(Context.start(tokens), None, budget).tokens)


def test_the_latest_occurrence_of_the_longest_suffix_is_copied():
    assert drafted([1, 2, 3, 40, 1, 2, 3, 50, 9, 3, 60, 1, 2, 3], budget=2) == [50, 9]
    assert drafted([1, 2, 3, 40, 1, 2, 3, 50, 9, 3, 60, 1, 2, 3], budget=2, max_ngram=1) == [60, 1]
    assert drafted([1, 2, 3]) == []


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_text_in_a_loop_is_drafted_round_after_round(period):
    loop = list(range(10, 10 + period))
    for begun in range(period):  # wherever in the loop the sequence stops
        expected = [loop[(begun + place) % period] for place in range(15)]
        assert drafted([1, 2, *loop * 4, *loop[:begun]], 15, length=20) == expected
    assert len(drafted([1, 2, *loop * 4], 15)) == 10, "at most `length`"


def test_what_a_copy_takes_from_itself_has_another_label():
    tree = PromptLookup().propose(Context.start([5, 6, 7, 8, 5, 6]), None, 8)
    assert list(tree.tokens) == [7, 8, 5, 6, 7, 8, 5, 6]
    assert [tree.label(node)[-1] for node in range(8)] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("wrong", [{"length": 0}, {"min_ngram": 0}, {"min_ngram": 4}])
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
        PromptLookup(**wrong)
