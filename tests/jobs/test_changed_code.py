"""A half-done run goes on after code has changed that it does not use, and is refused where its own method changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = 3
FOLDERS = ("hasten", "accel", "kernels", "cluster", "jobs", "conf")
QUANTIZERS = Path("accel", "compression", "quantizers")
# The command, stopped by the event that a block has been written.
STOPPED = """
import sys
from hasten.accel.compression.outputs.checkpoint import OutputFolder
from hasten.jobs.cli.main import main
write = OutputFolder.write_block
def write_one(*arguments):
    write(*arguments)
    raise KeyboardInterrupt
OutputFolder.write_block = write_one
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def checkout(folder):
    """A copy of the code that a test may change."""
    root = Path(__file__).resolve().parents[2]
    for name in FOLDERS:
        shutil.copytree(root / name, folder / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", folder / "checkout")
    return folder / "checkout"


def compress(checkout, source, *start):
    """A quick compression of the checkpoint into `out`, by the code of the copy, in a process of its own."""
    tokens = source.parent / "tokens.npy"
    options = {
        "model": source,
        "output": "out",
        "group_size": 32,
        "workers": 1,
        "calibration.source": tokens,
        "calibration.sequences": 8,
        "calibration.sequence_length": 16,
        "evaluation.source": tokens,
        "evaluation.sequences": 4,
        "evaluation.sequence_length": 16,
    }
    words = [f"{key}={value}" for key, value in options.items()]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, *(start or ("-m", "hasten")), "compress", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def append(path, line):
    path.write_text(f"{path.read_text()}\n{line}\n")


@pytest.mark.soak
@pytest.mark.slow
def test_a_half_done_run_resumes_if_another_quantizer_changed_and_not_if_its_own_did(checkout, source):
    stopped = compress(checkout, source, "-c", STOPPED)
    assert stopped.returncode != 0
    assert Path("out").is_dir()
    assert not Path("out", "config.json").exists()

    own, another = checkout / QUANTIZERS / "gptq.py", checkout / QUANTIZERS / "baq.py"
    original = own.read_text()
    append(own, "_ADDED = 1")
    refused = compress(checkout, source)
    assert refused.returncode != 0
    assert (
        "out was begun with other settings (code of hasten.accel.compression.quantizers.gptq): run with those"
        in refused.stderr
    )
    assert not Path("out", "config.json").exists()

    own.write_text(original)
    append(another, "_ADDED = 1")
    (checkout / QUANTIZERS / "another.py").write_text("NEW = True\n")
    resumed = compress(checkout, source)
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads(Path(resumed.stdout.splitlines()[-1].removeprefix("report: ")).read_text())
    assert report["metrics"]["blocks_resumed"] == 1
    assert len(report["layers"]) == 7 * BLOCKS
