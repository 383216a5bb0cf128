"""Exercises of the recall variant hold their answers, and its training repeats and resumes."""

import random

import pytest
import torch

from hasten.accel.evaluation.recall import TASKS
from hasten.accel.training.recall import TEXT, RecallSchedule, batch_of, exercise, skipping, train
from tests.models import tiny

LINES = [f"line {number} of a text\n" for number in range(300)]
SCHEDULE = RecallSchedule(stages=((128, 96, 1, 128), (128, 128, 3, 200)), batch=128, warmup_steps=1, decay=0.0)


def encode(text):
    """A token a character."""
    return [ord(letter) for letter in text]


@pytest.mark.parametrize("task", TASKS)
def test_the_tokens_of_answers_stand_in_the_context(task):
    ids, kinds = exercise(task, encode, LINES, 400, random.Random(1))
    assert len(ids) == len(kinds) <= 400
    first = kinds.index(2)
    context, rest = "".join(map(chr, ids[:first])), zip(ids[first:], kinds[first:], strict=True)
    answers = "".join(chr(token) if kind == 2 else "\0" for token, kind in rest).split("\0")
    asked = [answer.strip() for answer in answers if answer.strip()]
    assert len(asked) > 1
    assert all(answer in context for answer in asked)


def test_text_is_predicted_in_needles_and_repeats_and_not_in_lists():
    kinds = {task: set(exercise(task, encode, LINES, 300, random.Random(2))[1]) for task in (*TASKS, TEXT)}
    assert kinds[TEXT] == {1}
    assert all((1 in kinds[task]) == (task in ("needle", "repeated")) for task in TASKS)


def test_a_batch_reads_the_places_before_its_targets_and_weighs_answers_and_text_apart():
    batch = batch_of(encode, LINES, SCHEDULE, 3)
    assert torch.equal(batch.ids.flatten()[batch.read + 1], batch.targets)
    assert batch.answers.any()
    torch.testing.assert_close(batch.weights[batch.answers].sum(), torch.tensor(1.0))
    text = batch.weights[~batch.answers].sum()
    assert any(torch.isclose(text, torch.tensor(value)) for value in (0.0, SCHEDULE.text_weight))
    again, other = batch_of(encode, LINES, SCHEDULE, 3), batch_of(encode, LINES, SCHEDULE, 2)
    assert torch.equal(batch.ids, again.ids)
    assert not torch.equal(batch.ids, other.ids)


def test_positions_ascend_below_the_limit_skip_in_some_places_and_not_in_all_sequences():
    generator = random.Random(4)
    made = [skipping(64, 200, generator) for _ in range(40)]
    steps = torch.stack([positions.diff() for positions in made])
    assert bool((steps >= 1).all())
    assert max(int(positions[-1]) for positions in made) < 200
    assert {int(count) for count in (steps > 1).sum(1)} == {0, 1, 2, 3}
    assert all(int(positions[0]) == 0 for positions in made)
    assert torch.equal(skipping(64, 64, generator), torch.arange(64))
    assert bool((batch_of(encode, LINES, SCHEDULE, 3).positions[:, -1] < 200).all())


def trained(path, stop=None):
    """Weights after a training, or after `stop` steps of it, and the losses."""
    model = tiny.build("llama", vocab_size=128, max_position_embeddings=256)
    losses = []

    def report(step, loss, right):
        losses.append(loss)
        if step == stop:
            raise KeyboardInterrupt

    try:
        train(model, encode, LINES, SCHEDULE, path, report, save_every=1)
    except KeyboardInterrupt:
        return None, losses
    return model.state_dict(), losses


def test_a_killed_training_resumes_to_the_same_weights_and_leaves_the_embedding(tmp_path):
    whole, _ = trained(tmp_path / "whole.pt")
    trained(tmp_path / "parts.pt", stop=3)
    resumed, rest = trained(tmp_path / "parts.pt")
    assert len(rest) == 2  # the step that was killed before its state was saved, and those behind it
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = tiny.build("llama", vocab_size=128, max_position_embeddings=256).state_dict()
    changed = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert "model.embed_tokens.weight" not in changed
    assert {name for name in whole if "proj" in name or "norm" in name} <= changed
