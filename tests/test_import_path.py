"""What of the import path stays when hasten starts."""

import os
import sys

import pytest

from hasten import import_path


@pytest.fixture
def left(tmp_path, monkeypatch):
    """Leaves the current folder out; returns sys.path and PYTHONPATH, with HERE for the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)

    def leave(path, variable, is_root=False):
        here = str(tmp_path)
        monkeypatch.setattr(import_path, "ROOT", here if is_root else "/root")
        monkeypatch.setattr(sys, "path", [entry.replace("HERE", here) for entry in path])
        if variable is None:
            monkeypatch.delenv("PYTHONPATH", raising=False)
        else:
            monkeypatch.setenv("PYTHONPATH", variable.replace("HERE", here))
        import_path.leave_out_current_folder()
        assert os.environ["PYTHONSAFEPATH"] == "1"
        after = os.environ.get("PYTHONPATH")
        return [entry.replace(here, "HERE") for entry in sys.path], after and after.replace(here, "HERE")

    return leave


def test_python_m_and_empty_and_relative_entries_bring_no_current_folder(left):
    assert left(["HERE", "/std"], None) == (["/std"], None)
    assert left(["/bin", "/std"], "") == (["/bin", "/std"], None)
    assert left(["HERE", "HERE", "/a", "/std"], ":/a") == (["/a", "/std"], "/a")
    assert left(["/bin", "/a", "HERE", "/std"], "/a:.") == (["/bin", "/a", "/std"], "/a")
    assert left(["/bin", "HERE/b", "/std"], "b") == (["/bin", "HERE/b", "/std"], "HERE/b")


def test_an_absolute_path_of_the_user_stays(left):
    assert left(["HERE", "HERE", "/std"], "HERE") == (["HERE", "/std"], "HERE")
    assert left(["/bin", "HERE", "/std"], "HERE:") == (["/bin", "HERE", "/std"], "HERE")


def test_a_folder_of_python_itself_stays(left):
    assert left(["/bin", "HERE"], None) == (["/bin", "HERE"], None)
    assert left(["/bin", "/a", "HERE"], "/a") == (["/bin", "/a", "HERE"], "/a")


def test_a_checkout_without_an_installation_stays_and_child_processes_find_it(left):
    assert left(["HERE", "/std"], None, is_root=True) == (["HERE", "/std"], "HERE")
    assert left(["HERE", "HERE", "/std"], ".", is_root=True) == (["HERE", "HERE", "/std"], "HERE")
    assert left(["HERE", "/a", "/std"], "/a", is_root=True) == (["HERE", "/a", "/std"], "HERE:/a")
