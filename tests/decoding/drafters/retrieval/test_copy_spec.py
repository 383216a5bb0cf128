"""CopySpec copies what followed the first occurrence of the last gamma tokens."""

import pytest

from hasten.accel.decoding.context import Context
from hasten.accel.decoding.drafters.retrieval.copy_spec import CopySpec
from hasten.accel.errors import UserError


def drafted(tokens, budget=8, **fields):
    return list(CopySpec(**fields).propose(Context.start(tokens), None, budget).tokens)


def test_the_first_occurrence_is_copied_not_the_latest():
    tokens = [1, 2, 3, 40, 41, 1, 2, 3, 50, 51, 1, 2, 3]
    assert drafted(tokens, budget=3) == [40, 41, 1]
    assert drafted(tokens, length=1) == [40]


def test_fewer_than_gamma_repeated_tokens_give_nothing():
    tokens = [9, 1, 2, 7, 8, 1, 2]
    assert drafted(tokens) == []
    assert drafted(tokens, gamma=2, length=4) == [7, 8, 1, 2]


def test_the_suffix_does_not_match_itself_and_may_overlap_its_first_occurrence():
    assert drafted([1, 2, 3]) == []
    assert drafted([5, 5, 5], gamma=3) == []
    assert drafted([5, 5, 5, 5], gamma=3, length=1) == [5]


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_text_in_a_loop_is_drafted_round_after_round(period):
    loop = list(range(10, 10 + period))
    drafter, context = CopySpec(length=20), Context.start([1, 2, *loop * 4])
    tree = drafter.propose(context, None, 15)
    assert list(tree.tokens) == [loop[place % period] for place in range(15)]


def test_what_was_committed_is_found_as_if_it_had_been_in_the_prompt():
    drafter, context = CopySpec(gamma=2), Context.start([1, 2, 3])
    for token in [4, 1, 2, 9, 1, 2]:
        drafter.propose(context, None, 8)
        context.tokens.append(token)
    assert list(drafter.propose(context, None, 3).tokens) == [3, 4, 1]


def test_a_longer_match_has_another_label():
    short = CopySpec(gamma=2).propose(Context.start([8, 1, 2, 3, 9, 1, 2]), None, 1)
    long = CopySpec(gamma=2).propose(Context.start([6, 7, 8, 1, 2, 3, 6, 7, 8, 1, 2]), None, 1)
    assert short.tokens == long.tokens == [3]
    assert short.label(0) != long.label(0)


@pytest.mark.parametrize("name", ["gamma", "length"])
def test_zero_is_refused(name):
    with pytest.raises(UserError, match=f"{name}=0 must be 1 or more"):
        CopySpec(**{name: 0})
