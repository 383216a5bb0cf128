"""What a run says that it ran with."""

import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hasten.cluster.runtime import resources
from hasten.cluster.tracking.environment import FILE, environment, tracking_uri, write_environment


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, which the package seems to run from."""
    folder = tmp_path / "checkout"
    (folder / "cluster").mkdir(parents=True)
    (folder / "cluster" / "resources.py").write_bytes(b"one\n")
    identity = ["-c", "user.name=n", "-c", "user.email=n@n"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    monkeypatch.setattr(resources, "_ROOT", folder)
    return folder


def fresh() -> dict[str, Any]:
    """What a new process would find."""
    found: dict[str, Any] = environment.__wrapped__()
    return found


def head(folder: Path) -> str:
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_versions_and_machine_are_known() -> None:
    found = fresh()
    assert found["hasten"] == resources.package_version()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert list(found["packages"]) == sorted(found["packages"], key=str.lower)
    assert found["machine"] == resources.machine()


def test_an_unchanged_checkout_is_its_commit(checkout: Path) -> None:
    assert fresh()["git"] == {"commit": head(checkout), "diff": ""}


def test_a_changed_checkout_shows_what_differs_whatever_its_encoding(checkout: Path) -> None:
    (checkout / "cluster" / "resources.py").write_bytes(b"two \xe4\n")
    found = fresh()["git"]
    assert found["commit"] == f"{head(checkout)}-dirty"
    assert found["diff"].splitlines()[-2:] == ["-one", "+two \ufffd"]


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_ROOT", tmp_path)
    assert fresh()["git"] is None


def test_the_file_says_where_the_run_is_tracked(tmp_path: Path) -> None:
    assert tracking_uri(tmp_path / "run") is None
    assert write_environment(tmp_path / "run", "sqlite:////a.db") == tmp_path / "run" / FILE
    assert tracking_uri(tmp_path / "run") == "sqlite:////a.db"
    found = json.loads((tmp_path / "run" / FILE).read_text())
    assert found == {"tracking_uri": "sqlite:////a.db", **json.loads(json.dumps(environment()))}
    (tmp_path / "run" / FILE).write_text('{"tracking')
    assert tracking_uri(tmp_path / "run") is None
