"""A run's journal: whole lines only, attempts told apart, and no MLflow in the process that writes it."""

import json
import subprocess
import sys
import threading
from pathlib import Path

from hasten.cluster.tracking.events import Artifact, Metrics, Params
from hasten.cluster.tracking.journal import FILE, Journal, Reader, current, recording
from hasten.cluster.tracking.tracker import Tracker


def test_a_reader_gets_what_is_new_each_time(tmp_path: Path) -> None:
    reader, journal = Reader(tmp_path), Journal(tmp_path)
    told = [Params({"a": "\u2028\x85\r\n\udc80"}), Metrics({"b": 1.5}, 2), Artifact("/x", "figures")]
    assert reader.read() == (True, [])
    journal.write(told[0])
    journal.write(told[1])
    assert reader.read() == (False, told[:2])
    assert reader.read() == (False, [])
    journal.write(told[2])
    journal.close()
    assert reader.read() == (False, told[2:])
    assert Reader(tmp_path).read() == (True, told)


def test_without_a_journal_there_is_nothing_to_read(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "not there")
    assert reader.read() == (False, [])
    assert reader.attempt == ""


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    journal, reader = Journal(tmp_path), Reader(tmp_path)
    journal.write(Params({"a": "1"}))
    journal.close()
    line = json.dumps({"kind": "params", "values": {"b": "ä"}}, ensure_ascii=False).encode() + b"\n"
    with (tmp_path / FILE).open("ab", buffering=0) as file:
        cut = line.index("ä".encode()) + 1  # within a character
        file.write(line[:cut])
        assert reader.read() == (True, [Params({"a": "1"})])
        file.write(line[cut:-1])
        assert reader.read() == (False, [])
        file.write(line[-1:])
        assert reader.read() == (False, [Params({"b": "ä"})])


def test_a_new_attempt_begins_a_new_journal_and_is_noticed(tmp_path: Path) -> None:
    first, reader = Journal(tmp_path), Reader(tmp_path)
    first.write(Params({"a": "1"}))
    reader.read()
    attempt = reader.attempt
    second = Journal(tmp_path)
    first.write(Params({"late": "1"}))
    second.write(Params({"b": "2"}))
    assert reader.read() == (True, [Params({"b": "2"})])
    assert reader.attempt != attempt
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def write(name: str) -> None:
        for step in range(500):
            journal.write(Params({name: f"{step}-{name * 500}"}))

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _, told = Reader(tmp_path).read()
    for name in "ab":
        mine = [event for event in told if name in event.values]  # type: ignore[union-attr]
        assert mine == [Params({name: f"{step}-{name * 500}"}) for step in range(500)]


def test_trackers_write_there_what_they_would_have_told_mlflow(tmp_path: Path) -> None:
    figure = tmp_path / "error.png"
    with recording(tmp_path), Tracker(None, "tests", "point", tmp_path, register="small") as tracker:
        tracker.params({"bits": 4})
        tracker.metrics({"error": 0.5, "none": None}, 7)
        tracker.figure(figure)
        assert tracker.run_id == ""
        tracker.report({"job": "compress", "metrics": {"bytes": 12}, "output": "/models/small"})
    assert current() is None
    _, told = Reader(tmp_path).read()
    assert Params({"bits": "4"}) in told
    assert Artifact(str(figure), "figures") in told
    numbers = [(event.values, event.step) for event in told if isinstance(event, Metrics)]
    assert numbers == [({"error": 0.5}, 7), ({"bytes": 12.0}, 0)]
    registered = [event for event in told if hasattr(event, "tags")]
    assert [(event.name, event.path) for event in registered] == [("small", "/models/small")]
    assert [event.path for event in told if isinstance(event, Artifact)][-1] == str(tmp_path / "report.json")


def test_the_process_of_a_point_needs_no_mlflow_and_makes_no_store(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from hasten.cluster.tracking.journal import recording
from hasten.cluster.tracking.tracker import Tracker
with recording(Path("point")), Tracker(None, "tests", "point", Path("point"), system_seconds=60) as tracker:
    tracker.metrics({"a": 1.0})
print(sorted({"mlflow", "sqlalchemy", "ray", "torch"} & set(sys.modules)))
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["point"]
    _, told = Reader(tmp_path / "point").read()
    assert [event.values for event in told if isinstance(event, Metrics)] == [{"a": 1.0}]
