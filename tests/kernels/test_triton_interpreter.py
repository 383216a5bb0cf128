"""Every Triton kernel equals its reference in Triton's interpreter, and each op with a Triton kernel is checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.ops import OPS

ROOT = Path(__file__).parents[2]
RUN = """
import importlib, json, sys, traceback
from tests.kernels import interpreter
interpreter.speed_up()
results = {}
for op in sys.argv[1:]:
    count, name = 0, "import"
    try:
        for name, check in importlib.import_module(f"tests.kernels.ops.{op}").checks("cpu"):
            print(op, name, file=sys.stderr, flush=True)
            check()
            count += 1
        results[op] = [count, ""]
    except Exception:
        results[op] = [count, f"{name}: {traceback.format_exc()}"]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results():
    """Number of passed checks and the error of each op."""
    # Triton reads TRITON_INTERPRET when it is imported: a process of its own, one for all ops.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, *OPS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_equal_their_references_in_the_interpreter(op, results):
    count, error = results[op]
    assert not error
    assert count > 0


def test_each_op_with_a_triton_kernel_has_checks():
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernel.py")}
    assert folders == set(OPS)
