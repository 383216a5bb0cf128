"""`hasten ui`: MLflow's server on the store of a run, which runs then write through."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hasten
from hasten.accel.errors import UserError
from hasten.cluster.tracking import store
from hasten.cluster.tracking.server import serve
from hasten.cluster.tracking.tracker import Tracker
from hasten.jobs.cli.commands.ui import tracking_uri
from hasten.jobs.cli.main import main
from tests.traps import imported, set_traps

ROOT = Path(hasten.__file__).parents[1]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_runs_write_through_the_server_that_shows_them(tmp_path, port):
    uri = store.default_uri(tmp_path)
    with Tracker(uri, "tests", "before", tmp_path / "run") as tracker:
        tracker.metrics({"loss": 1.0})
    here = tmp_path / "here"
    here.mkdir()
    set_traps(here, "module")
    command = [sys.executable, "-m", "hasten", "ui", str(tmp_path / "run"), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=here, env=environment)
    try:
        while not store.serving(uri):
            assert server.poll() is None
            time.sleep(0.1)
        assert store.serving(uri) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"http://127.0.0.1:{port} serves this store already"):
            serve(uri, "127.0.0.1", port + 1)
        figure = tmp_path / "figure.png"
        figure.write_bytes(b"png")
        with Tracker(uri, "tests", "through the server", tmp_path / "other") as tracker:
            tracker.metrics({"loss": 0.5}, step=3)
            tracker.figure(figure)
    finally:
        server.send_signal(signal.SIGTERM)
        out, _ = server.communicate(timeout=60)
    assert server.returncode == 0
    assert out == f"http://127.0.0.1:{port} shows {uri}; Ctrl-C ends it\n"
    assert store.serving(uri) is None
    assert imported(here) == []
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert {name: run.data.metrics["loss"] for name, run in runs.items()} == {"before": 1.0, "through the server": 0.5}
    through = runs["through the server"].info.run_id
    assert [file.path for file in client.list_artifacts(through, "figures")] == ["figures/figure.png"]


def test_a_folder_without_runs_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ui"]) == 2
    assert "there are no runs in" in capsys.readouterr().err
    assert main(["ui", str(tmp_path)]) == 2
    assert "is no folder of a run or a sweep" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--host 127.0.0.1 --port {port} cannot be used .*take another port"):
            serve(f"sqlite:///{tmp_path}/mlflow.db", "127.0.0.1", port)


def test_the_store_of_a_tracking_uri_is_that_uri(tmp_path):
    (tmp_path / "mlflow.db").touch()
    assert tracking_uri(f"sqlite:///{tmp_path}/mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri("http://tracking:5000") == "http://tracking:5000"
