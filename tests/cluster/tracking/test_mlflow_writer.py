"""One thread a process, several processes a file, and a server in between where there is one."""

import json
import logging
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hasten.cluster.tracking import store
from hasten.cluster.tracking.mlflow_writer import Writer, status

CALLS, AT_ONCE = 50, 4
OTHER = """
import sys
from tests.cluster.tracking.test_mlflow_writer import opened, written

writer = opened(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(written(writer))
"""


def opened(uri: str) -> Writer:
    writer = Writer(uri, "tests")
    writer.open()
    return writer


def written(writer: Writer) -> str:
    """Id of a run, after writing 200 metrics to it."""
    from mlflow.entities import Metric

    run = writer.submit(lambda client, experiment: client.create_run(experiment).info.run_id)
    for call in range(CALLS):
        steps = range(call * AT_ONCE, (call + 1) * AT_ONCE)
        metrics = [Metric("a", step, 0, step) for step in steps]
        writer.submit(lambda client, _, metrics=metrics: client.log_batch(run.result(), metrics=metrics))
    writer.close()
    return str(run.result())


def test_two_processes_that_write_to_one_file_lose_nothing_and_never_warn(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    root = Path(__file__).parents[3]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", OTHER, uri], cwd=root, text=True, **pipes)
    mine = opened(uri)
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    runs = [written(mine)]
    output, errors = other.communicate()
    runs.append(output.strip())
    assert errors == ""
    assert caplog.records == []
    client = MlflowClient(tracking_uri=uri)
    for run in runs:
        history = client.get_metric_history(run, "a")
        assert [(entry.step, entry.value) for entry in history] == [(step, step) for step in range(CALLS * AT_ONCE)]


def test_calls_come_in_order_and_give_back_what_they_return(uri: str) -> None:
    writer = Writer(uri, "tests")
    writer.open()
    seen: list[int] = []
    results = [writer.submit(lambda client, experiment, number: seen.append(number) or number, n) for n in range(20)]
    writer.close()
    assert seen == list(range(20))
    assert [result.result() for result in results] == seen


def test_a_store_that_is_lost_costs_one_warning_and_what_comes_after(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(client: Any, experiment: str) -> None:
        raise ConnectionError("server gone\nfor good")

    writer = Writer(uri, "tests")
    writer.open()
    results = [writer.submit(function) for function in (lambda *_: "written", gone, lambda *_: "too late", gone)]
    writer.close()
    assert [result.result() for result in results] == ["written", None, None, None]
    assert writer.lost
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [f"nothing more is tracked at {uri} (report.json still gets all results): server gone"]


def test_only_an_open_writer_writes(uri: str) -> None:
    writer = Writer(uri, "tests")
    with pytest.raises(ValueError, match="only once it is open"):
        writer.submit(lambda *_: None).result()
    writer.close()


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """URL of a server that answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def named(tmp_path: Path, text: str) -> str:
    """URI of a sqlite file whose server's file has this text."""
    store.server_file(tmp_path / "mlflow.db").write_text(text)
    return store.default_uri(tmp_path)


def note(url: str) -> str:
    """What `hasten ui` in this process would leave beside the file."""
    return json.dumps({"url": url, "host": platform.node(), "process": os.getpid()})


def test_a_server_that_serves_the_file_and_answers_is_used(server: str, tmp_path: Path) -> None:
    assert store.serving(named(tmp_path, note(server))) == server


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"process": 2**22 + 1}])
def test_what_answers_in_place_of_the_server_is_not_used(server: str, tmp_path: Path, other: dict[str, Any]) -> None:
    note = {"url": server, "host": platform.node(), "process": os.getpid(), **other}
    assert store.serving(named(tmp_path, json.dumps(note))) is None


def test_a_server_that_is_gone_is_not_used(server: str, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    assert store.serving(named(tmp_path, note(url))) is None
    assert store.serving(store.default_uri(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize("text", ["", "{", "{}", "null", '["http://localhost"]'])
def test_a_damaged_note_of_a_server_is_as_none(tmp_path: Path, text: str) -> None:
    assert store.serving(named(tmp_path, text)) is None


def test_what_is_a_server_itself_has_no_other(server: str) -> None:
    assert store.serving(server) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, "FINISHED"), (SystemExit(0), "FINISHED"), (SystemExit(1), "KILLED"), (ValueError(), "FAILED")],
)
def test_a_run_ends_as_its_error_says(error: BaseException | None, expected: str) -> None:
    assert status(error) == expected
