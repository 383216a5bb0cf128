import json
import logging
import math
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.accel.errors import UserError
from hasten.cluster.runtime import resources
from hasten.cluster.tracking import store
from hasten.cluster.tracking.tracker import Tracker, write_report

KEYS = ["job", "config", "metrics", "layers", "output"]
REPORT: dict[str, Any] = {
    "job": "compress",
    "config": {"bits": 4, "calibration": {"source": "library"}},
    "metrics": {"perplexity": 9.5, "kl_divergence": None, "bytes": 1200},
    "layers": [{"layer": "model.layers.0.mlp.up_proj", "error": np.float32(0.5), "bits": np.int64(4)}],
    "output": Path("models/small"),
}


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def the_run(uri: str, name: str) -> Any:
    experiment = client(uri).get_experiment_by_name("tests")
    found = [run for run in client(uri).search_runs([experiment.experiment_id]) if run.info.run_name == name]
    assert len(found) == 1
    return found[0]


def test_a_run_holds_parameters_metrics_files_code_version_and_machine(uri: str, tmp_path: Path) -> None:
    figure = tmp_path / "error.png"
    figure.write_bytes(b"png")
    with Tracker(uri, "tests", "first", tmp_path / "run") as tracker:
        tracker.params({"bits": 4, "calibration": {"source": "library", "sequences": [1, 2]}, "output": None})
        for step in range(3):
            tracker.metrics({"error": step / 2, "seconds": torch.tensor(step), "name": "block", "none": None}, step)
        tracker.figure(figure)
        assert tracker.report(REPORT) == tmp_path / "run" / "report.json"
        run_id = tracker.run_id
    run = the_run(uri, "first")
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "bits": "4",
        "calibration.source": "library",
        "calibration.sequences": "[1, 2]",
        "output": "null",
    }
    assert run.data.metrics == {"error": 1.0, "seconds": 2.0, "perplexity": 9.5, "bytes": 1200.0}
    history = client(uri).get_metric_history(run_id, "error")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert run.data.tags["machine.cpu"] == resources.cpu_model()
    assert int(run.data.tags["machine.memory_bytes"]) > 0
    assert run.data.tags["hasten.version"]
    artifacts = tmp_path / "runs" / "mlartifacts" / run_id / "artifacts"
    assert sorted(file.relative_to(artifacts).as_posix() for file in artifacts.rglob("*.*")) == [
        "environment.json",
        "figures/error.png",
        "report.json",
    ]


def test_two_runs_share_a_store_and_an_experiment(uri: str, tmp_path: Path) -> None:
    with Tracker(uri, "tests", "a", tmp_path / "a") as first, Tracker(uri, "tests", "b", tmp_path / "b") as second:
        first.metrics({"perplexity": 1.0})
        second.metrics({"perplexity": 2.0})
    assert the_run(uri, "a").data.metrics == {"perplexity": 1.0}
    assert the_run(uri, "b").data.metrics == {"perplexity": 2.0}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no"), "FAILED"),
        (RuntimeError("no"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_a_run_that_ends_early_is_marked(uri: str, tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), Tracker(uri, "tests", "early", tmp_path):
        raise error
    assert the_run(uri, "early").info.status == status


def test_a_terminated_run_is_marked_killed(uri: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, Tracker(uri, "tests", "terminated", tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert the_run(uri, "terminated").info.status == "KILLED"


def test_runs_of_dead_processes_are_marked_killed_by_the_next_and_live_ones_left_alone(
    uri: str, tmp_path: Path
) -> None:
    with Tracker(uri, "tests", "alive", tmp_path) as alive:
        experiment = client(uri).get_experiment_by_name("tests").experiment_id
        host = resources.machine()["host"]
        # This process's id, but of a process that started long ago.
        tags = {"machine.host": host, "hasten.process": f"{os.getpid()} 12.00"}
        dead = client(uri).create_run(experiment, run_name="dead", tags=tags)
        elsewhere = client(uri).create_run(experiment, tags={**tags, "machine.host": f"not-{host}"})
        with Tracker(uri, "tests", "next", tmp_path):
            pass
        assert client(uri).get_run(dead.info.run_id).info.status == "KILLED"
        assert client(uri).get_run(elsewhere.info.run_id).info.status == "RUNNING"
        assert client(uri).get_run(alive.run_id).info.status == "RUNNING"


def test_long_names_and_values_are_cut_to_what_mlflow_takes(uri: str, tmp_path: Path) -> None:
    with Tracker(uri, "tests", "long", tmp_path) as tracker:
        tracker.params(
            {"k" * 300: 1, "value": "v" * 7000, "ö=[x]": 2} | {f"p{number}": number for number in range(120)}
        )
        tracker.metrics({f"m{number}": number for number in range(1001)})
    run = the_run(uri, "long")
    assert len(run.data.params) == 123
    assert run.data.params["k" * 250] == "1"
    assert run.data.params["value"] == "v" * 6000
    assert run.data.params["___x_"] == "2"
    assert len(run.data.metrics) == 1001


def test_metrics_of_a_step_are_one_call(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    calls: list[int] = []
    log_batch = MlflowClient.log_batch

    def counted(self: Any, run_id: str, metrics: Any = (), **named: Any) -> Any:
        calls.append(len(metrics))
        return log_batch(self, run_id, metrics=metrics, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    with Tracker(uri, "tests", "batched", tmp_path) as tracker:
        tracker.metrics({f"m{number}": number for number in range(50)}, step=1)
    assert calls == [50]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_named(
    silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CONNECT_SECONDS", 0.2)
    with pytest.raises(UserError, match=f"tracking.uri={silent_server} cannot be reached"):
        Tracker(silent_server, "tests", "name", tmp_path).__enter__()


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"tracking.uri={uri} cannot be reached"):
        Tracker(uri, "tests", "name", tmp_path).__enter__()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("notes" * 1000)
    with pytest.raises(UserError, match=r"tracking.uri=sqlite:////.*/notes.db cannot be used") as caught:
        Tracker(f"sqlite:///{tmp_path}/notes.db", "tests", "name", tmp_path).__enter__()
    assert "\n" not in str(caught.value)
    assert (tmp_path / "notes.db").read_text() == "notes" * 1000


def test_a_store_lost_while_the_job_runs_does_not_end_the_job(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionError("server gone\nfor good")

    with Tracker(uri, "tests", "lost", tmp_path) as tracker:
        monkeypatch.setattr(MlflowClient, "log_batch", lost)
        tracker.metrics({"a": 1.0})
        tracker.metrics({"a": 2.0})
        path = tracker.report(REPORT)
    assert json.loads(path.read_text())["job"] == "compress"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"nothing more is tracked at {uri} (report.json still gets all results): server gone"]


def test_the_job_does_not_wait_for_the_tables_of_a_new_file(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_went_on = threading.Event()

    def slow(file: Path) -> None:
        assert job_went_on.wait(60)
        shutil.copy(database, file)

    monkeypatch.setattr(store, "make_database", slow)
    monkeypatch.chdir(tmp_path)
    with Tracker(None, "tests", "new", tmp_path) as tracker:
        tracker.metrics({"a": 1.0})
        assert not (tmp_path / "runs" / "mlflow.db").exists()
        job_went_on.set()
    assert tracker.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert the_run(tracker.uri, "new").data.metrics == {"a": 1.0}


def test_a_database_appears_whole_and_what_a_killed_process_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mlflow.db"
    gone = 2**22 + 1  # above Linux's largest process id
    left_over = [tmp_path / f".mlflow.db.{gone}", tmp_path / f".mlflow.db.{gone}-journal"]
    for path in left_over:
        path.touch()
    mine_not_theirs = tmp_path / f".mlflow.db.{os.getppid()}"
    mine_not_theirs.touch()

    def connect(tracking_uri: str) -> None:
        assert not file.exists()
        Path(tracking_uri.removeprefix("sqlite:///")).write_text("tables")

    monkeypatch.setattr("mlflow.MlflowClient", connect)
    store.make_database(file)
    assert file.read_text() == "tables"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["mlflow.db", mine_not_theirs.name])


def test_tracking_is_quiet(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(logging.INFO), Tracker(uri, "tests", "quiet", tmp_path) as tracker:
        tracker.metrics({"a": 1.0})
    assert [record for record in caplog.records if record.name.partition(".")[0] in ("mlflow", "alembic")] == []
    assert capfd.readouterr().out == ""


def test_a_tracker_logs_only_inside_its_block(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside its `with` block"):
        Tracker(uri, "tests", "name", tmp_path).metrics({"a": 1.0})


def test_a_report_keeps_its_keys_and_holds_plain_values(tmp_path: Path) -> None:
    path = write_report(tmp_path / "run", {**REPORT, "metrics": {"perplexity": math.inf, "kl_divergence": math.nan}})
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert list(report) == KEYS
    assert report["metrics"] == {"perplexity": None, "kl_divergence": None}
    assert report["layers"] == [{"layer": "model.layers.0.mlp.up_proj", "error": 0.5, "bits": 4}]
    assert report["output"] == "models/small"
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path, {"job": "first"})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, {"job": "second"})
    assert json.loads(path.read_text()) == {"job": "first"}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
