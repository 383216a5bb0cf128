"""A group that is lost again and again is given up, and what its user can do is said."""

import json

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from hasten.accel.errors import UserError
from hasten.accel.training.resumable import PROGRESS_FILE
from hasten.cluster.programs import training
from hasten.cluster.programs.training import train_in_groups


class Lost:
    """A group that writes a checkpoint, or none, and then fails."""

    started = 0

    def __init__(self, folder, steps, error):
        type(self).started += 1
        if steps:
            (folder / PROGRESS_FILE).write_text(json.dumps({"step": steps.pop(0)}))
        self._error, self.closed = error, False

    def prepare(self):
        raise self._error

    def close(self):
        self.closed = True


def lose(folder, steps, error):
    """Start groups that fail until they are given up; all of them must have been closed."""
    Lost.started = 0
    groups = []

    def start():
        groups.append(Lost(folder, steps, error))
        return groups[-1]

    try:
        train_in_groups(start, lambda trainer: None, folder)
    finally:
        assert all(group.closed for group in groups)


def test_groups_that_are_lost_without_a_checkpoint_in_between_are_given_up(tmp_path):
    with pytest.raises(UserError, match=r"4 groups in a row lost a rank, .* the checkpoint of step 6 is kept"):
        lose(tmp_path, [2, 4, 6], ActorDiedError())
    assert Lost.started == 2 + training.LOSSES


def test_ranks_without_memory_are_not_started_again(tmp_path):
    error = RayTaskError("train", "Traceback", MemoryError())
    with pytest.raises(UserError, match=r"out of memory: give a smaller train.micro_batch, a higher train.zero"):
        lose(tmp_path, [], error)
    assert Lost.started == 1


def test_an_error_of_the_loss_is_raised_at_once(tmp_path):
    with pytest.raises(RayTaskError):
        lose(tmp_path, [], RayTaskError("train", "Traceback", ValueError("no such layer")))
    assert Lost.started == 1
