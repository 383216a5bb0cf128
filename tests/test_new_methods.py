"""A new method is new files only: the tutorials' drafter and quantizer as they are written, a draft length and a head.

New level kinds, searchers and jobs have tests of their own beside their families.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
# A block of code whose first line is the path of its file.
BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```", re.DOTALL)
pytestmark = pytest.mark.slow

DRAFT_LENGTH = '''"""Alternating draft length: drafts of two sizes in turn."""

from collections.abc import Callable
from dataclasses import dataclass

from hasten.accel.decoding.lengths.base import DraftLength, LengthController
from hasten.accel.decoding.lengths.timing import PassCosts


@dataclass(frozen=True)
class Alternating(DraftLength):
    """Drafts `low` tokens and `high` tokens in turn."""

    low: int = 2
    high: int = 6

    def max_tokens(self, limit: int) -> int:
        """The larger size."""
        return self.high

    def start(self, measure_costs: Callable[[], PassCosts], limit: int) -> LengthController:
        """A controller that starts with the larger size."""
        return AlternatingController(self)


class AlternatingController(LengthController):
    """Counts the passes."""

    def __init__(self, sizes: Alternating) -> None:
        self.max_nodes = sizes.high
        self._sizes, self._passes = sizes, 0

    def budget(self, sequences: int) -> int:
        """The size of the next pass."""
        self._passes += 1
        return self._sizes.high if self._passes % 2 else self._sizes.low
'''
HEAD = '''"""Acceptance head of one block: the smallest network that a drafter can read."""

from dataclasses import dataclass

from hasten.accel.training.heads.acceptance_training import AcceptanceTraining


@dataclass(frozen=True)
class SmallAcceptance(AcceptanceTraining):
    """The acceptance head with another default depth."""

    blocks: int = 1
'''
FILES = {
    "accel/decoding/lengths/alternating.py": DRAFT_LENGTH,
    "conf/draft_length/alternating.yaml": "_target_: hasten.accel.decoding.lengths.alternating.Alternating\n",
    "accel/training/heads/small_acceptance.py": HEAD,
    "conf/head/small_acceptance.yaml": "_target_: hasten.accel.training.heads.small_acceptance.SmallAcceptance\n",
}


def tutorial_files() -> dict[str, str]:
    """Files that the tutorials show, by path."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(TUTORIALS.glob("add-*.md"))]
    return {path: code for text in texts for path, code in BLOCK.findall(text)}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with the new files in it, none of which was there."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("accel", "cluster", "conf", "hasten", "jobs", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, text in (FILES | tutorial_files()).items():
        assert not (folder / name).exists(), name
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(checkout, *words):
    """Output of Python with the words in the copy; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=checkout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_each_tutorial_shows_a_module_a_config_and_a_test():
    roots = sorted(Path(name).parts[0] for name in tutorial_files())
    assert roots == ["accel", "accel", "conf", "conf", "tests", "tests"]


def test_the_new_methods_pass_the_contracts_of_their_families_and_their_own_tests(checkout):
    own = [name for name in tutorial_files() if name.startswith("tests/")]
    contracts = [
        "tests/decoding/drafters/test_contract.py",
        "tests/decoding/lengths/test_contract.py",
        "tests/compression/quantizers/test_contract.py",
        "tests/training/heads/test_contract.py",
    ]
    names = "most_frequent or clipped or alternating or small_acceptance"
    out = run(checkout, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-k", names, *own, *contracts)
    passed = re.search(r"(\d+) passed", out)
    # Each family's contract and both tutorials' tests have run.
    assert passed, out
    assert int(passed[1]) > 40, out


def test_help_lists_them_and_a_job_runs_them(checkout):
    text = run(checkout, "-m", "hasten", "decode", "--help")
    assert "most_frequent" in text
    assert "drafter.length=4" in text
    assert "alternating" in text
    assert "draft_length.high=6" in text
    assert "clipped" in run(checkout, "-m", "hasten", "compress", "--help")
    assert "small_acceptance" in run(checkout, "-m", "hasten", "train_drafter", "--help")
    out = run(checkout, "-m", "hasten", "replay", "drafter=most_frequent", "drafter.length=2", "sequences=1")
    assert out.splitlines()[-1].startswith("report: ")
