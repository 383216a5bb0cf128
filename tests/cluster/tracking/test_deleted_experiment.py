"""A run whose experiment was deleted in MLflow."""

import json
from pathlib import Path

import pytest

from hasten.cluster.tracking.tracker import Tracker


def test_a_run_in_a_deleted_experiment_goes_on_with_one_warning_and_its_report(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("tests"))
    with Tracker(uri, "tests", "second", tmp_path / "second") as tracker:
        tracker.metrics({"loss": 1.0})
        path = tracker.report({"job": "tests", "metrics": {"loss": 0.5}})
    assert json.loads(path.read_text())["metrics"] == {"loss": 0.5}
    rejected, lost = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "Current state is deleted" in rejected
    assert "report.json still gets all results" in lost
