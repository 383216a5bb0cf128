"""Runs from unusual places: the current folder holds modules of the same names, TMPDIR has a long path."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hasten
from hasten.cluster.runtime.session_folders import short_folder
from tests.traps import imported, set_traps

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(hasten.__file__).parents[1]
# As pip writes it for `hasten` of pyproject.toml.
COMMAND = "import sys\nfrom hasten.__main__ import main\nsys.exit(main())\n"
COMPRESS = (
    "compress workers=1 calibration.sequences=2 calibration.sequence_length=64 evaluation.sequences=0 "
    "\"output='a model, [x]'\""
)
RUNS = {
    "sweep": "decode --multirun prompts=prompts.jsonl max_new_tokens=2,4 workers=1 sweep.cpus=2",
    "plan": "plan decode",
}


def run(folder, *start, words, **variables):
    """Standard output of hasten, started in a folder by Python with the words of `start`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "RAY_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *start, *shlex.split(words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("report: ")


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "a folder, ü=[x]"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "def "}\n')
    return folder


@pytest.mark.parametrize("name", [pytest.param("sweep", marks=pytest.mark.soak), "plan"])
def test_nothing_in_the_current_folder_is_imported(here, tmp_path, name):
    (tmp_path / "command").write_text(COMMAND)
    set_traps(here)
    run(here, tmp_path / "command", words=RUNS[name])
    assert imported(here) == []


@pytest.mark.soak
def test_python_m_hasten_imports_nothing_there_and_uses_a_long_tmpdir_through_a_short_link(here, tmp_path):
    set_traps(here, "module")
    long = tmp_path / ("x" * 170)
    long.mkdir()
    before = links_to(long)
    # An empty entry of PYTHONPATH is the current folder, too.
    run(here, "-m", "hasten", words=COMPRESS, PYTHONPATH=f"{ROOT}:", TMPDIR=str(long))
    assert imported(here) == []
    assert (here / "a model, [x]" / "config.json").is_file()
    assert list((long / "ray").glob("session_2*"))
    assert links_to(long) == before == []


def links_to(folder):
    """Links to Ray's folder in this one."""
    links = [path / "ray" for path in Path(short_folder()).glob("hasten-*") if (path / "ray").is_symlink()]
    return [link for link in links if link.readlink() == folder / "ray"]
