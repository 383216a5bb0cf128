"""A RAY_ADDRESS that somebody left behind does not concern a session on this machine."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ray
from hasten.cluster.runtime.session import session

@ray.remote
def answer():
    return 42

with session(None, cpus=1, exactly=True):
    print(ray.get(answer.remote()))
"""


@pytest.mark.ray
def test_a_stale_address_is_not_joined():
    # A port that nothing listens on.
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["42"]
