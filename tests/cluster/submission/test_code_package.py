import zipfile

import pytest

from hasten.accel.errors import UserError
from hasten.cluster.submission import code_package
from hasten.cluster.submission.code_package import PACKAGES, pack, source


def names(path):
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


@pytest.mark.parametrize("chosen", ["tree", "installed"])
def test_the_packages_are_sent_below_one_root_and_nothing_that_python_makes(tmp_path, chosen):
    pack(chosen, tmp_path / "one.zip")
    pack(chosen, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    found = names(tmp_path / "one.zip")
    folders = [name.split("/") for name in found if ".dist-info/" not in name]
    assert {folder[0] for folder in folders} == {"hasten"}
    assert {folder[1] for folder in folders if len(folder) > 2} == set(PACKAGES) - {"hasten"}
    assert {
        "hasten/__init__.py",
        "hasten/jobs/cli/submitted.py",
        "hasten/conf/compress.yaml",
        "hasten/accel/models/embedded/target/config.json",
    } <= set(found)
    assert not [name for name in found if "__pycache__" in name]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with little in it, without git."""
    root = tmp_path / "checkout"
    for name in ("hasten/__init__.py", "jobs/run.py", "conf/a.yaml", "accel/__pycache__/a.pyc", "tests/a.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(code_package, "_ROOT", root)
    monkeypatch.setattr(code_package, "_distribution_info", dict)
    return root


def test_a_tree_without_git_is_all_that_is_there(checkout, tmp_path):
    pack("tree", tmp_path / "code.zip")
    assert names(tmp_path / "code.zip") == ["hasten/__init__.py", "hasten/conf/a.yaml", "hasten/jobs/run.py"]


def test_with_git_files_count_that_it_tracks_or_would_track(checkout, tmp_path):
    def git(*words):
        code_package.subprocess.run(["git", "-C", str(checkout), *words], check=True, capture_output=True)

    git("init")
    (checkout / ".gitignore").write_text("*.secret\n")
    (checkout / "jobs" / "key.secret").touch()
    (checkout / "jobs" / "gone.py").touch()
    git("add", ".")
    (checkout / "jobs" / "new.py").touch()
    (checkout / "jobs" / "gone.py").unlink()
    pack("tree", tmp_path / "code.zip")
    assert names(tmp_path / "code.zip") == [
        "hasten/__init__.py",
        "hasten/accel/__pycache__/a.pyc",
        "hasten/conf/a.yaml",
        "hasten/jobs/new.py",
        "hasten/jobs/run.py",
    ]


def test_what_is_sent_is_what_runs_here_unless_it_is_named(checkout, tmp_path):
    assert source(None) == "tree"
    (checkout / "pyproject.toml").unlink()
    assert source(None) == "installed"
    assert source("none") == "none"
    with pytest.raises(UserError, match=r"--env tree: hasten runs from .* which is no checkout"):
        source("tree")
    with pytest.raises(UserError, match="--env other is wrong: expected tree, installed, none or the path of a wheel"):
        source("other")


def test_a_wheel_is_sent_as_it_is_and_must_be_hastens(tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/code.py", "")
    with pytest.raises(UserError, match=r"some.whl is no wheel of hasten: it does not contain hasten/jobs/cli/main.py"):
        pack(str(wheel), tmp_path / "code.zip")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("hasten/jobs/cli/main.py", "code")
    pack(source(str(wheel)), tmp_path / "code.zip")
    assert names(tmp_path / "code.zip") == ["hasten/jobs/cli/main.py", "other/code.py"]
    wheel.write_text("none")
    with pytest.raises(UserError, match=r"some.whl is no wheel \(File is not a zip file\)"):
        pack(str(wheel), tmp_path / "code.zip")
