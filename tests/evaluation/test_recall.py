"""Recall tasks: the context holds the answer, and a seed makes the same samples."""

import pytest

from hasten.accel.errors import UserError
from hasten.accel.evaluation.recall import TASKS, samples

TEXT = "".join(f"line {number} of some text about nothing\n" for number in range(400))


def encode(text):
    """A token a character."""
    return [ord(letter) for letter in text]


def decoded(tokens):
    return "".join(map(chr, tokens))


@pytest.mark.parametrize("task", TASKS)
def test_the_context_fits_and_holds_every_answer(task):
    for sample in samples(task, encode, TEXT, 900, 5, seed=1):
        assert 0.5 * 900 < len(sample.context) <= 900
        for turn in sample.turns:
            assert turn.question
            assert turn.answer
            assert decoded(turn.answer).strip() in decoded(sample.context)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_makes_the_same_samples_and_another_seed_others(task):
    first, again, other = (samples(task, encode, TEXT, 500, 3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({sample.context for sample in first}) == 3


def test_a_needle_s_number_stands_once_in_the_context():
    for sample in samples("needle", encode, TEXT, 800, 5, seed=3):
        assert decoded(sample.context).count(decoded(sample.turns[0].answer).strip()) == 1


def test_a_joint_answer_needs_section_and_key():
    for sample in samples("joint", encode, TEXT, 900, 5, seed=4):
        section, key = decoded(sample.turns[0].question).split("\n")
        assert decoded(sample.context).count(section) == 1
        assert decoded(sample.context).count(f"\n{key}") > 1
        after = decoded(sample.context).split(section)[1]
        assert after.split(f"{key}")[1].startswith(decoded(sample.turns[0].answer))


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="tasks=needles is none of"):
        samples("needles", encode, TEXT, 100, 1, 0)
