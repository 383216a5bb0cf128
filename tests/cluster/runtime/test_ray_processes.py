"""Ray on this machine runs without the processes that nothing uses, and with all of them where that is asked for."""

import subprocess
import sys

import pytest
from ray._private import parameter, services

from hasten.cluster.runtime.ray_processes import fewer_processes
from hasten.cluster.runtime.ray_processes.patch import SWITCH

pytestmark = pytest.mark.ray

NAMES = [(parameter, "RayParams"), (services, "start_api_server"), (services, "start_ray_process")]
_SCRIPT = """
import time
import psutil, ray
from hasten.cluster.runtime.session import session

with session(None, cpus=1):
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    running = {child: child.cmdline() for child in psutil.Process().children(recursive=True)}
    for absent in ("monitor.py", "dashboard.py", "dashboard/agent.py", "ray::DashboardAgent"):
        assert not any(word.endswith(absent) for words in running.values() for word in words), absent
    [agent] = [child for child, words in running.items() if words[-1].endswith("idle_agent.py")]
    # An agent that ends takes Ray with it; this one stays for as long as Ray.
    time.sleep(2)
    assert agent.is_running()
    assert ray.get(ray.remote(lambda: 8).remote()) == 8
agent.wait(30)
print("passed")
"""


def test_a_ray_of_a_job_s_own_runs_no_dashboard_agent_or_monitor():
    found = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=300, check=False)
    assert found.stdout == "passed\n", found.stderr


def functions():
    return [getattr(module, name) for module, name in NAMES]


def test_functions_of_ray_are_back_afterwards_and_stay_where_all_processes_are_wanted(monkeypatch):
    before = functions()
    with fewer_processes():
        assert all(now is not then for now, then in zip(functions(), before, strict=True))
    assert functions() == before
    monkeypatch.setenv(SWITCH, "all")
    with fewer_processes():
        assert functions() == before


def test_another_ray_starts_as_it_likes(monkeypatch):
    monkeypatch.setattr(services, "start_ray_process", lambda executable: executable)
    before = functions()
    with fewer_processes():
        assert functions() == before
