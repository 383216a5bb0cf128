"""The token of a cluster that this process starts."""

import os
from pathlib import Path

import pytest

from hasten.cluster.runtime.authentication import make_token


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty home folder, and no variable of Ray's authentication."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    # Set first, so that it is removed again after the test.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")


def test_ray_writes_its_own_where_it_can() -> None:
    make_token()
    assert not os.environ["RAY_AUTH_TOKEN"]


def test_a_home_folder_that_cannot_be_written_to_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    make_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_token_of_the_user_and_a_mode_without_tokens_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    make_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    make_token()
    assert not os.environ["RAY_AUTH_TOKEN"]
