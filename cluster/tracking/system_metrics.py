"""Samples of the machine's load during a run, under the names of MLflow's system metrics."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

Log = Callable[[Mapping[str, float], int], None]


class SystemMetrics:
    """A thread that calls log(metrics, step) every `seconds` until `stop`. folder: whose disk is sampled."""

    def __init__(self, seconds: float, log: Log, folder: Path) -> None:
        self._seconds, self._log, self._folder = seconds, log, folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when the last sample is logged."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        psutil.cpu_percent()  # the next call gives the use since this one
        begun = psutil.net_io_counters()  # None without a network
        step = 0
        while not self._ended.wait(self._seconds):
            metrics = sample(self._folder)
            now = psutil.net_io_counters()
            if begun is not None and now is not None:
                metrics["system/network_transmit_megabytes"] = (now.bytes_sent - begun.bytes_sent) / 1e6
                metrics["system/network_receive_megabytes"] = (now.bytes_recv - begun.bytes_recv) / 1e6
            self._log(metrics, step)
            step += 1


def sample(folder: Path) -> dict[str, float]:
    """Use of this machine's CPU, memory, disk and NVIDIA GPUs."""
    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if folder.exists():
        metrics["system/disk_usage_percentage"] = psutil.disk_usage(str(folder)).percent
    return metrics | gpus()


def gpus() -> dict[str, float]:
    """Use and memory of each GPU; empty without nvidia-smi.

    They are read from nvidia-smi, because the driver of a run has no CUDA context.
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
    """Metrics from nvidia-smi's lines `percent, MiB used, MiB total`, one for each GPU; values of N/A are left out."""
    metrics: dict[str, float] = {}
    for number, line in enumerate(text.splitlines()):
        values = [part.strip() for part in line.split(",")]
        if len(values) != 3:
            continue
        used, memory, total = map(_number, values)
        if used is not None:
            metrics[f"system/gpu_{number}_utilization_percentage"] = used
        if memory is not None:
            metrics[f"system/gpu_{number}_memory_usage_megabytes"] = memory * 1.048576
        if memory is not None and total:
            metrics[f"system/gpu_{number}_memory_usage_percentage"] = 100 * memory / total
    return metrics


def _number(text: str) -> float | None:
    """The number in a text; None for `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return None
