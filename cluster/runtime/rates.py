"""Rates of this machine, measured in a few seconds, and assumed rates of GPUs and networks that it does not have."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from hasten.accel.compression.quantizers.base import Scheme
from hasten.accel.compression.quantizers.grid import find_grid
from hasten.accel.costs.estimate import Rates
from hasten.cluster.runtime.prefork import can_fork
from hasten.import_path import ROOT

# Assumed of a GPU that this machine lacks, after an H100: half of the data sheet's FLOP/s of matrix products in
# bfloat16 and float32, bytes per second of its memory, mean seconds of a kernel launch or a view, bytes of a context.
GPU_FLOPS, GPU_EXACT_FLOPS, GPU_MEMORY, GPU_LAUNCH, GPU_CONTEXT = 4e14, 3e13, 2e12, 3e-6, 600 * 10**6
# Assumed bytes per second between two nodes: 10 Gbit/s.
NETWORK = 1.25e9
# Seconds to start Ray on an idle machine.
SESSION = 6.0
# CPU seconds of the start of a worker that is forked, Ray's part included.
FORKED = 0.4
_SECONDS = 0.25
_COPIED_BYTES, _WRITTEN_BYTES = 1 << 26, 1 << 25
_CACHED = 1 << 16


@cache
def measure(dtype: torch.dtype, threads: int, width: int, inner: int, folder: Path) -> Rates:
    """Rates of one process with this number of threads; cached in the process.

    width, inner: sizes of the matrix products. folder: where disk writes are timed. Arithmetic is timed in CPU seconds,
    so that other load on the machine affects only `share`.
    """
    baseline = _Baseline()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with torch.inference_mode():
            flops = _flops(dtype, width, inner, threads)
            exact = flops if dtype == torch.float32 else _flops(torch.float32, width, inner, threads)
            elements, launch, memory = _elements(threads), _launch(), _memory(threads)
    finally:
        torch.set_num_threads(before)
    share = (time.process_time() - cpu) / threads / (time.perf_counter() - wall)
    process = baseline.result()
    return Rates(
        flops=flops,
        exact_flops=exact,
        elements=elements,
        launch=launch,
        memory=memory,
        store=memory,
        read=memory,
        disk=_disk(folder),
        network=NETWORK,
        start=process["start"],
        finish=process["finish"],
        session=SESSION,
        worker_bytes=int(process["worker_bytes"]),
        driver_bytes=int(process["driver_bytes"]),
        device_bytes=GPU_CONTEXT,
        share=min(1.0, share),
        forked=FORKED if can_fork() else None,
    )


class _Baseline:
    """A separate process that runs hasten.cluster.runtime.baseline, while this one measures its rates."""

    def __init__(self) -> None:
        path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-P", "-m", "hasten.cluster.runtime.baseline"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def result(self) -> dict[str, float]:
        """What it measured; RuntimeError if it failed."""
        output, errors = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"hasten.cluster.runtime.baseline failed: {errors.strip().splitlines()[-1:]}")
        measured: dict[str, float] = json.loads(output.strip().splitlines()[-1])
        return measured


def _seconds(work: Callable[[], object], threads: int = 1) -> float:
    """Mean CPU seconds of a thread for one call, over as many calls as take 0.25 s."""
    work()
    begin, calls = time.process_time(), 0
    while time.process_time() - begin < _SECONDS * threads:
        work()
        calls += 1
    return (time.process_time() - begin) / threads / calls


def _flops(dtype: torch.dtype, width: int, inner: int, threads: int) -> float:
    rows = max(64, min(2048, (1 << 30) // (width * inner)))
    inputs, weight = torch.ones(rows, width, dtype=dtype), torch.ones(inner, width, dtype=dtype)
    return 2.0 * rows * width * inner / _seconds(lambda: torch.nn.functional.linear(inputs, weight), threads)


def _elements(threads: int) -> float:
    """Numbers per second through an elementwise operation of the search for quantization grids."""
    weight, tried = torch.rand(_CACHED // 256, 256), 8
    seconds = _seconds(lambda: find_grid(weight, Scheme(4, 128), tried), threads)
    return weight.numel() * tried * 9 / seconds


def _launch() -> float:
    x, y = torch.ones(64, 32), torch.ones(32)

    def launches() -> None:
        for row in range(16):
            y.add_(x[row])

    # 16 views and 16 operations in place; each counts as a launch.
    return _seconds(launches) / 32


def _memory(threads: int) -> float:
    source, target = torch.ones(_COPIED_BYTES // 4), torch.empty(_COPIED_BYTES // 4)
    return _COPIED_BYTES / _seconds(lambda: target.copy_(source), threads)


def _disk(folder: Path) -> float:
    """Bytes per second written and synced in a folder, or in its nearest existing parent."""
    while not folder.is_dir():
        folder = folder.parent
    content = bytes(_WRITTEN_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder if os.access(folder, os.W_OK) else None) as file:
        begin = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN_BYTES / (time.perf_counter() - begin)
