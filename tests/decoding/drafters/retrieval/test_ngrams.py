"""The index of n-grams is that of the tokens that are left, however it was extended and rolled back."""

import random

import pytest

from hasten.accel.decoding.drafters.retrieval import ngrams
from hasten.accel.decoding.drafters.retrieval.ngrams import NGramIndex, copied


def occurrences(tokens, n, latest):
    """Position after every n-gram that a token follows, by search."""
    found = {}
    for end in range(n, len(tokens)):
        ngram = tuple(tokens[end - n : end])
        if latest or ngram not in found:
            found[ngram] = end
    return found


@pytest.mark.parametrize("kept", [1, 4, 1000], ids=["rebuilt", "some", "all"])
@pytest.mark.parametrize("latest", [True, False])
def test_it_knows_the_tokens_that_are_left(latest, kept, monkeypatch):
    monkeypatch.setattr(ngrams, "_UNDO_TOKENS", kept)
    dice, tokens, index = random.Random(0), [], NGramIndex(1, 3, latest)
    for _ in range(300):
        if dice.random() < 0.4:
            length = max(0, len(tokens) - dice.randrange(12))
            index.truncate(length)
            del tokens[length:]
        tokens += dice.choices(range(4), k=dice.randrange(8))
        index.extend(tokens)
        for n in (1, 2, 3):
            expected = occurrences(tokens, n, latest)
            assert {ngram: index.after(ngram) for ngram in expected} == expected
            assert sum(len(ngram) == n for ngram in index._ends) == len(expected)


def test_a_copy_goes_on_through_itself():
    assert copied([1, 2, 3, 4], 2, 7) == [3, 4, 3, 4, 3, 4, 3]
    assert copied([1, 2, 3, 4], 1, 2) == [2, 3]
