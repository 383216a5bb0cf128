import fcntl

import pytest

from hasten.accel.errors import UserError
from hasten.accel.outputs import lock
from hasten.accel.outputs import resumable as folder
from hasten.accel.outputs.resumable import ResumableFolder
from tests.compression.other_run import held


def test_a_lock_ends_with_its_process(tmp_path):
    with held(tmp_path / "lock") as process:
        assert not lock.take(tmp_path / "lock")
        process.kill()
        assert lock.take(tmp_path / "lock", seconds=60)
    lock.give_back(tmp_path / "lock")


def test_a_released_lock_can_be_taken_by_anybody(tmp_path):
    for _ in range(2):
        assert lock.take(tmp_path / "lock")
        assert lock.take(tmp_path / "lock"), "it is this process's"
    lock.give_back(tmp_path / "lock")
    lock.give_back(tmp_path / "lock")
    with held(tmp_path / "lock"):
        assert not lock.take(tmp_path / "lock")


def test_a_folder_that_another_run_writes_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_SECONDS_TO_END", 0.0)
    mine = ResumableFolder(tmp_path / "out", tmp_path)
    with held(tmp_path / "out/.hasten/lock"):
        with pytest.raises(UserError, match=r"^another run writes output=.*/out: wait for it, or give another output$"):
            mine.open({"bits": 4}, overwrite=True)
        assert [path.name for path in (tmp_path / "out/.hasten").iterdir()] == ["lock"]
    mine.open({"bits": 4}, overwrite=False)
    mine.release()


def test_a_folder_that_could_not_be_made_is_not_locked(tmp_path, monkeypatch):
    def interrupt(made, path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumableFolder, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ResumableFolder(tmp_path / "out", tmp_path).open({"bits": 4}, overwrite=False)
    with (tmp_path / "out/.hasten/lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_files_written_by_two_processes_at_once_are_whole(tmp_path):
    def save(temporary):
        # The other process writes in between.
        folder.write_whole(tmp_path / "layer.safetensors", lambda other: other.write_text("the same"))
        temporary.write_text("the same")

    folder.write_whole(tmp_path / "layer.safetensors", save)
    assert [path.name for path in tmp_path.iterdir()] == ["layer.safetensors"]
    assert (tmp_path / "layer.safetensors").read_text() == "the same"
