"""Runs a command and counts what all processes of its tree use."""

import os
import re
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A worker of Ray's before its first task; one that becomes an actor is counted as that.
_IDLE = "idle worker"
_DRIVER = "driver"


@dataclass(frozen=True)
class Peak:
    """Most memory, in bytes, that a process of one kind held; unshared leaves out what it maps together with others.

    Ray's object store is mapped by everybody who reads from it and counts in each one's resident set.
    """

    processes: int = 0
    rss_bytes: int = 0
    unshared_bytes: int = 0


@dataclass(frozen=True)
class Usage:
    """What a command used: its exit status, wall seconds, CPU seconds of its whole tree, and peaks by process kind."""

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
    """Usage of a command, its output appended to log; its tree is looked at every `interval` seconds.

    CPU seconds are the larger of two lower bounds: what the system counted for children that were waited for, which
    misses those that outlive their parent, and the sum of what was seen, which misses each one's last moments.
    environment: variables that are set for it; an empty string removes one. folder: where it runs.
    """
    merged = {**os.environ, **(environment or {})}
    before, started = _waited_for(), time.perf_counter()
    seen: dict[tuple[int, float], _Process] = {}
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
            while _runs(process, interval):
                _look(process.pid, seen)
        finally:
            _end(process)
    seconds = time.perf_counter() - started
    cpu = max(_waited_for() - before, sum(each.cpu_seconds for each in seen.values()))
    return Usage(process.returncode, seconds, cpu, _peaks(seen.values()))


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


def _runs(process: subprocess.Popen[bytes], interval: float) -> bool:
    try:
        process.wait(interval)
    except subprocess.TimeoutExpired:
        return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _waited_for() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _look(root: int, seen: dict[tuple[int, float], _Process]) -> None:
    import psutil

    try:
        parent = psutil.Process(root)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return
    for each in tree:
        try:
            words = each.cmdline()
            memory, cpu = each.memory_info(), each.cpu_times()
            # Process ids are used again: a process is its id and its start.
            known = seen.setdefault((each.pid, each.create_time()), _Process(_IDLE))
            kind = _DRIVER if each.pid == root else kind_of(words)
            known.kind = known.kind if kind == _IDLE else kind
            known.rss_bytes = max(known.rss_bytes, memory.rss, _high_water(each.pid))
            known.unshared_bytes = max(known.unshared_bytes, memory.rss - getattr(memory, "shared", 0))
            known.cpu_seconds = cpu.user + cpu.system
        except psutil.Error:  # it ended meanwhile
            continue


def _high_water(pid: int) -> int:
    """Peak resident set that the system recorded, which no sampling misses; 0 where it does not."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _peaks(processes: Any) -> dict[str, Peak]:
    peaks: dict[str, Peak] = {}
    for each in processes:
        peak = peaks.get(each.kind, Peak())
        peaks[each.kind] = Peak(
            peak.processes + 1,
            max(peak.rss_bytes, each.rss_bytes),
            max(peak.unshared_bytes, each.unshared_bytes),
        )
    return peaks
