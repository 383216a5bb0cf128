import sys

from hasten.jobs.bench.processes.watch import kind_of, watched

# A child that holds 64 MB and spins for a fifth of a CPU second, under a parent that only waits for it.
CHILD = """
import time
held = bytearray(64_000_000)
while time.process_time() < 0.2:
    pass
print("done")
time.sleep(0.5)
"""
PARENT = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, sys.argv[1]]).returncode)"


def test_memory_and_processor_time_of_a_child_are_counted(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    log = tmp_path / "log"
    usage = watched([sys.executable, "-c", PARENT, str(script)], log, interval=0.05)
    assert usage.status == 0
    assert log.read_text() == "done\n"
    assert usage.cpu_seconds >= 0.2
    assert usage.seconds >= 0.5
    assert usage.peaks["child.py"].processes == 1
    assert usage.peaks["child.py"].rss_bytes >= 64_000_000
    assert usage.peaks["driver"].rss_bytes < usage.peaks["child.py"].rss_bytes


def test_the_exit_status_comes_back(tmp_path):
    assert watched([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log").status == 3


def test_an_empty_string_removes_a_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_TEST_GONE", "1")
    script = "import os; print(os.environ.get('HASTEN_TEST_GONE'), os.environ.get('HASTEN_TEST_SET'))"
    log = tmp_path / "log"
    watched([sys.executable, "-c", script], log, {"HASTEN_TEST_GONE": "", "HASTEN_TEST_SET": "2"})
    assert log.read_text() == "None 2\n"


def test_processes_are_named_by_what_they_are():
    assert kind_of(["ray::Calibrator.run_block"]) == "Calibrator"
    assert kind_of(["ray::solve()"]) == "solve"
    assert (
        kind_of(["ray::IDLE"])
        == kind_of(["python", "/ray/_private/workers/default_worker.py", "--node"])
        == "idle worker"
    )
    assert kind_of(["/site-packages/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=x"]) == "raylet"
    assert kind_of(["/usr/bin/python3", "-u", "/site-packages/ray/_private/log_monitor.py"]) == "log_monitor.py"
    assert kind_of(["/usr/bin/python3", "-m", "hasten"]) == "python3"
