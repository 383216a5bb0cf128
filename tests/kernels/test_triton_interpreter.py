"""Every Triton kernel equals its reference in Triton's interpreter, and each op with a Triton kernel is checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.ops import OPS

ROOT = Path(__file__).parents[2]
RUN = """
import importlib, sys
op = importlib.import_module(f"tests.kernels.ops.{sys.argv[1]}")
count = 0
for name, check in op.checks("cpu"):
    print(name, flush=True)
    check()
    count += 1
print(f"passed {count}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_equal_their_references_in_the_interpreter(op):
    # Triton reads TRITON_INTERPRET when it is imported: a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, op]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert int(done.stdout.split()[-1]) > 0


def test_each_op_with_a_triton_kernel_has_checks():
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernel.py")}
    assert folders == set(OPS)
