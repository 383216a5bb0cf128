"""Where a session's sockets, temporary files and processes are."""

import os
import tempfile
from pathlib import Path

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.runtime import session_folders
from hasten.cluster.runtime.session_folders import (
    check_folders,
    current_folder,
    empty_folder,
    ray_folder,
)

SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Without the variables of the tests' own process."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def test_rays_own_default_and_short_folders_are_taken_as_they_are(monkeypatch):
    with ray_folder() as folder:
        assert folder is None
    monkeypatch.setenv("TMPDIR", "/tmp")
    with ray_folder() as folder:
        assert folder == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", "/var/tmp")
    with ray_folder() as folder:
        assert folder == "/var/tmp/ray"


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("character", ["x", "ü"])
def test_a_long_folder_is_reached_by_a_link_short_enough_for_sockets(tmp_path, monkeypatch, name, character):
    long = tmp_path / (character * 100)
    long.mkdir()
    monkeypatch.setenv(name, str(long))
    with ray_folder() as folder:
        assert len(os.fsencode(f"{folder}/{SOCKET}")) <= 107
        Path(folder, "file").touch()
        assert (long / "ray" / "file").exists()
    assert not os.path.lexists(folder)
    assert not Path(folder).parent.exists()
    assert (long / "ray" / "file").exists()


def test_the_longest_folder_without_a_link_is_short_enough(monkeypatch):
    longest = "/" + "x" * 38
    monkeypatch.setenv("TMPDIR", longest)
    with ray_folder() as folder:
        assert folder == f"{longest}/ray"
        assert len(f"{folder}/{SOCKET}") == 107


def test_without_a_short_folder_one_line_says_what_to_set(monkeypatch):
    monkeypatch.setattr(session_folders, "short_folder", lambda: None)
    monkeypatch.setenv("TMPDIR", "/" + "x" * 60)
    with pytest.raises(UserError, match=r"TMPDIR=/x+ is too long .* at most 39 bytes: set RAY_TMPDIR to a shorter one"):
        ray_folder().__enter__()


def test_folders_for_temporary_files_that_cannot_be_used_are_one_line(tmp_path, monkeypatch):
    check_folders()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"TMPDIR=.*nowhere is no folder: set it to a folder that can be written to"):
        check_folders()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    check_folders()
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))
    with pytest.raises(UserError, match=r"TMPDIR=.* cannot be written to: set it"):
        check_folders()
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda: (_ for _ in ()).throw(FileNotFoundError(2, "none")))
    with pytest.raises(UserError, match=r"there is no folder for temporary files .*: set TMPDIR to one"):
        check_folders()


def test_a_deleted_current_folder_and_a_missing_home_are_one_line(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    with pytest.raises(UserError, match=r"the current folder cannot be read .*: change to one that exists"):
        check_folders()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match=r"no home folder, .*: set HOME to a folder"):
        check_folders()


def test_the_current_folder_is_an_empty_one_for_a_time_and_then_what_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with empty_folder() as empty, current_folder(empty):
        assert os.getcwd() == os.path.realpath(empty)
        assert os.listdir() == []
    assert os.getcwd() == str(tmp_path)
    assert not os.path.exists(empty)
    with pytest.raises(KeyError), current_folder("/"):
        raise KeyError
    assert os.getcwd() == str(tmp_path)


def test_a_checkout_stays_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(session_folders, "ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with current_folder("/"):
        assert os.getcwd() == str(tmp_path)
