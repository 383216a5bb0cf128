"""The file of results, with results that mean nothing."""

import json

import pytest

from hasten.accel.errors import UserError
from hasten.jobs.decode.completions import Completions

SETTINGS = {"seed": 0}


def written(path, *records, settings=SETTINGS, overwrite=False):
    """Results that were there, after adding some."""
    completions = Completions(path, settings, overwrite)
    kept = completions.kept()
    with completions:
        for record in records:
            completions.write(record)
    return kept


def test_results_are_kept_by_their_ids_as_text(tmp_path):
    path = tmp_path / "out.jsonl"
    assert written(path, {"id": 1, "completion": "é\u2028\x85"}, {"id": "two"}) == {}
    assert written(path, {"id": 3}) == {"1": {"id": 1, "completion": "é\u2028\x85"}, "two": {"id": "two"}}
    assert [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]] == [1, "two", 3]


def test_a_line_that_was_cut_off_is_no_result(tmp_path):
    path = tmp_path / "out.jsonl"
    written(path, {"id": 1}, {"id": 2})
    path.write_bytes(path.read_bytes()[:-1])  # whole but for its end
    assert list(written(path, {"id": 2})) == ["1"]
    assert path.read_bytes() == b'{"id": 1}\n{"id": 2}\n'


def test_only_an_earlier_runs_file_is_overwritten(tmp_path):
    path = tmp_path / "out.jsonl"
    written(path, {"id": 1})
    with pytest.raises(UserError, match=r"was begun with other settings \(seed: 0, now 1\)"):
        written(path, settings={"seed": 1})
    assert written(path, {"id": 2}, settings={"seed": 1}, overwrite=True) == {}
    assert path.read_bytes() == b'{"id": 2}\n'
    other = tmp_path / "mine.txt"
    other.write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        written(other, overwrite=True)
    assert other.read_text() == "mine"


def test_settings_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "out.jsonl"
    written(path, {"id": 1})
    (tmp_path / "out.jsonl.meta.json").write_text("")
    with pytest.raises(UserError, match=r"out\.jsonl\.meta\.json is no JSON"):
        written(path)
    assert written(path, overwrite=True) == {}


def test_a_full_disk_is_one_line(tmp_path):
    completions = Completions(tmp_path / "out.jsonl", SETTINGS, overwrite=False)

    def fill():
        with completions:
            completions._file.close()
            completions._file = open("/dev/full", "ab")  # noqa: SIM115  # closed by the context
            completions.write({"id": 1})

    with pytest.raises(UserError, match="the disk is full while writing"):
        fill()


def test_two_runs_do_not_write_one_output(tmp_path):
    path = tmp_path / "out.jsonl"
    with Completions(path, {"seed": 0}, False) as first:
        first.write({"id": "a"})
        with (
            pytest.raises(UserError, match=r"another run writes output=.*out\.jsonl"),
            Completions(path, {"seed": 0}, True),
        ):
            pass
        first.write({"id": "b"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]
