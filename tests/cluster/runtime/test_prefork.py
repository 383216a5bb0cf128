"""Workers are forked from one process that has imported their modules, or started as Ray does, and behave alike."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private import services

from hasten.cluster.runtime.prefork import forked_workers
from hasten.cluster.runtime.prefork.patch import SWITCH

pytestmark = [pytest.mark.ray, pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")]


@ray.remote(num_cpus=1, max_restarts=1, max_task_retries=2)
class Worker:
    """Says what its process is like."""

    def __init__(self) -> None:
        # Before anything is imported here.
        self.loaded = [name for name in ("torch", "hasten.cluster.programs.calibration") if name in sys.modules]

    def facts(self) -> tuple[list[str], int, int, str, int]:
        import torch

        return self.loaded, os.getpid(), os.getppid(), os.environ.get("PROBE", ""), torch.get_num_threads()

    def run(self, command: list[str]) -> int:
        """Exit status of a process of its own."""
        return subprocess.run(command, check=False).returncode

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def facts_of(worker) -> tuple[list[str], int, int, str, int]:
    return ray.get(worker.facts.remote(), timeout=120)


def started(**variables: str):
    return Worker.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "2", **variables}}).remote()


def runs(process: int) -> bool:
    """Whether it has not ended; one that nobody has waited for has."""
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_workers_have_their_modules_threads_and_variables(ray_session):
    one, other = (facts_of(started()) for _ in range(2))
    assert one[0] == ["torch", "hasten.cluster.programs.calibration"]
    assert one[1] != other[1]
    assert one[2] == other[2]
    assert one[4] == 2
    # Modules may have read a variable of another value: such a worker imports them itself.
    own = facts_of(started(PROBE="own"))
    assert own[3] == "own"
    assert own[0] == []
    assert own[2] != one[2]


def test_a_killed_worker_is_restarted_and_ends_its_own_processes(ray_session):
    worker = started()
    before = facts_of(worker)
    assert ray.get(worker.run.remote(["false"])) == 1
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(worker.die.options(max_task_retries=0).remote(), timeout=120)
    after = facts_of(worker)
    assert after[1] != before[1]
    assert not runs(before[1])


def test_it_is_switched_off_by_a_variable_and_with_gpus(monkeypatch):
    original = services.start_raylet
    with forked_workers():
        assert services.start_raylet is not original
    assert services.start_raylet is original
    with monkeypatch.context() as context:
        context.setenv(SWITCH, "0")
        with forked_workers():
            assert services.start_raylet is original
    monkeypatch.setattr("hasten.cluster.runtime.prefork.patch._GPUS", (str(Path(__file__)),))
    with forked_workers():
        assert services.start_raylet is original


_SCRIPT = """
import os, signal, sys, time
import psutil, ray
from hasten.cluster.runtime.session import session

def parent():
    return os.getppid(), "torch" in sys.modules

with session(None, cpus=1):
    (template, loaded) = ray.get(ray.remote(parent).remote())
    assert loaded
    assert template in [child.pid for child in psutil.Process().children()]
assert not psutil.pid_exists(template)
with session(None, cpus=2):
    (template, loaded) = ray.get(ray.remote(parent).remote())
    os.kill(template, signal.SIGKILL)
    time.sleep(1)
    # In a worker that is not there yet.
    (other, loaded) = ray.get(ray.remote(parent).options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "3"}}).remote())
    assert other != template and not loaded
print("passed")
"""


@pytest.mark.slow
def test_the_template_process_ends_with_its_ray_and_workers_start_without_it(tmp_path):
    # With a Ray of its own, in another process.
    script = tmp_path / "job.py"
    script.write_text(_SCRIPT)
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert found.stdout.endswith("passed\n"), found.stderr
