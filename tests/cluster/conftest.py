"""What the tests of tracking share: copies of a sqlite file with MLflow's tables."""

import shutil
from pathlib import Path

import pytest

from hasten.cluster.tracking import store


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    """URI of the test's own copy, in `runs` of its folder."""
    (tmp_path / "runs").mkdir()
    shutil.copy(database, tmp_path / "runs" / "mlflow.db")
    return store.default_uri(tmp_path / "runs")
