"""Runs a command and measures CPU time and memory of its process tree."""

import os
import re
import resource
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# A Ray worker before its first task; one that becomes an actor is counted as that actor.
_IDLE = "idle worker"
_DRIVER = "driver"


@dataclass(frozen=True)
class Peak:
    """Peak memory, in bytes, over the processes of one kind; unshared_bytes excludes shared pages.

    Ray's object store is shared memory: it counts in the resident set of every process that reads from it.
    """

    processes: int = 0
    rss_bytes: int = 0
    unshared_bytes: int = 0


@dataclass(frozen=True)
class Usage:
    """Exit status of a command, wall seconds, CPU seconds of its process tree, and peak memory by process kind."""

    status: int
    seconds: float
    cpu_seconds: float
    peaks: Mapping[str, Peak] = field(default_factory=dict)


@dataclass
class _Process:
    kind: str
    rss_bytes: int = 0
    unshared_bytes: int = 0
    cpu_seconds: float = 0.0


def watched(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    interval: float = 0.5,
    folder: Path | None = None,
) -> Usage:
    """Usage of a command; its output is appended to log, its process tree polled every `interval` seconds.

    CPU seconds are the larger of two lower bounds: what the system counted for terminated children, which misses
    processes that outlive their parent, and the sum over polls, which misses the last moments of each process.
    environment: variables to set; an empty string removes one. folder: working directory.
    """
    merged = {**os.environ, **(environment or {})}
    before, started = _child_cpu_seconds(), time.perf_counter()
    processes: dict[tuple[int, float], _Process] = {}
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in merged.items() if value},
            cwd=folder,
        )
        try:
            while _is_running(process, interval):
                _poll(process.pid, processes)
        finally:
            _terminate(process)
    seconds = time.perf_counter() - started
    cpu = max(_child_cpu_seconds() - before, sum(known.cpu_seconds for known in processes.values()))
    return Usage(process.returncode, seconds, cpu, _peaks(processes.values()))


def kind_of(words: Sequence[str]) -> str:
    """Kind of a process by its command line: an actor's or task's name, or the script or program that it runs."""
    if not words:
        return _IDLE
    title = re.match(r"ray::(\w+)", words[0])
    if title:
        return _IDLE if title.group(1) == "IDLE" else title.group(1)
    scripts = [word for word in words[1:3] if word.endswith(".py")]
    name = Path(scripts[0] if scripts else words[0].split()[0]).name
    return _IDLE if name == "default_worker.py" else name


def _is_running(process: subprocess.Popen[bytes], interval: float) -> bool:
    """Whether the process still runs after waiting `interval` seconds for it."""
    try:
        process.wait(interval)
    except subprocess.TimeoutExpired:
        return True
    return False


def _terminate(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _child_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _poll(root: int, processes: dict[tuple[int, float], _Process]) -> None:
    """Update `seen`, by process id and start time, from the tree below root."""
    try:
        parent = psutil.Process(root)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return
    for process in tree:
        try:
            words = process.cmdline()
            memory, cpu = process.memory_info(), process.cpu_times()
            # Process ids are reused: id and start time identify a process.
            known = processes.setdefault((process.pid, process.create_time()), _Process(_IDLE))
            kind = _DRIVER if process.pid == root else kind_of(words)
            known.kind = known.kind if kind == _IDLE else kind
            known.rss_bytes = max(known.rss_bytes, memory.rss, _high_water(process.pid))
            known.unshared_bytes = max(known.unshared_bytes, memory.rss - getattr(memory, "shared", 0))
            known.cpu_seconds = cpu.user + cpu.system
        except psutil.Error:  # it has ended since
            continue


def _high_water(pid: int) -> int:
    """Peak resident set as recorded by the kernel, in bytes, which polling cannot miss; 0 if not available."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _peaks(processes: Iterable[_Process]) -> dict[str, Peak]:
    peaks: dict[str, Peak] = {}
    for process in processes:
        peak = peaks.get(process.kind, Peak())
        peaks[process.kind] = Peak(
            peak.processes + 1,
            max(peak.rss_bytes, process.rss_bytes),
            max(peak.unshared_bytes, process.unshared_bytes),
        )
    return peaks
