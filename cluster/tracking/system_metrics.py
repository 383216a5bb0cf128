"""What the machine does while a run is going on, under the names that MLflow shows as system metrics."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

Log = Callable[[Mapping[str, float], int], None]


class SystemMetrics:
    """A thread that gives a sample to `log` every so many seconds, until `stop`; folder: whose disk is watched."""

    def __init__(self, seconds: float, log: Log, folder: Path) -> None:
        self._seconds, self._log, self._folder = seconds, log, folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples; returns when none is being taken."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        psutil.cpu_percent()  # counts from here
        begun = psutil.net_io_counters()  # None where there is no network
        step = 0
        while not self._ended.wait(self._seconds):
            found = sample(self._folder)
            now = psutil.net_io_counters()
            if begun is not None and now is not None:
                found["system/network_transmit_megabytes"] = (now.bytes_sent - begun.bytes_sent) / 1e6
                found["system/network_receive_megabytes"] = (now.bytes_recv - begun.bytes_recv) / 1e6
            self._log(found, step)
            step += 1


def sample(folder: Path) -> dict[str, float]:
    """CPU, memory and disk of this machine, and every NVIDIA GPU's use and memory."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if folder.exists():
        found["system/disk_usage_percentage"] = psutil.disk_usage(str(folder)).percent
    return found | gpus()


def gpus() -> dict[str, float]:
    """Use and memory of each GPU; nothing where there is no nvidia-smi.

    Asked of nvidia-smi, because the driver of a run holds no CUDA context.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    query = "--query-gpu=utilization.gpu,memory.used,memory.total"
    try:
        text = subprocess.run(
            [command, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parsed(text)


def parsed(text: str) -> dict[str, float]:
    """Metrics of nvidia-smi's lines `percent, MiB used, MiB there`, one a GPU; what a GPU does not tell is left out."""
    found: dict[str, float] = {}
    for number, line in enumerate(text.splitlines()):
        values = [part.strip() for part in line.split(",")]
        if len(values) != 3:
            continue
        used, memory, total = map(_number, values)
        if used is not None:
            found[f"system/gpu_{number}_utilization_percentage"] = used
        if memory is not None:
            found[f"system/gpu_{number}_memory_usage_megabytes"] = memory * 1.048576
        if memory is not None and total:
            found[f"system/gpu_{number}_memory_usage_percentage"] = 100 * memory / total
    return found


def _number(text: str) -> float | None:
    """Number of a text; None of `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return None
