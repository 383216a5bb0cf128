"""What the tests of tracking share: a sqlite file with MLflow's tables, which take seconds to make, and its copies."""

import shutil
from pathlib import Path

import pytest

from hasten.cluster.tracking import store


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite file with MLflow's tables."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    store.import_mlflow()
    store.make_database(file)
    return file


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    """URI of the test's own copy, in `runs` of its folder."""
    (tmp_path / "runs").mkdir()
    shutil.copy(database, tmp_path / "runs" / "mlflow.db")
    return store.default_uri(tmp_path / "runs")
