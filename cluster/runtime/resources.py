"""Resource usage of this process, and facts about the machine and the code that it runs."""

import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from hasten.import_path import ROOT

# The checkout, where the code runs from one.
_ROOT = Path(ROOT)
_MADV_DONTNEED = 4
# Growth of the resident set since memory was released last from which on it is released again: pages that are given
# back must be cleared by the system before they are used again, a good part of the time of small blocks.
_WORTH_RELEASING = 1 << 26
# Least resident memory since the last release, in bytes.
_least_resident = 0


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes; mapped files count while they are mapped."""
    try:
        # Not ru_maxrss, which survives exec: a process started by a large one would report its parent's peak.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Return unused memory to the system: freed blocks of the C library, and mapped pages of Ray's object store.

    The C library keeps freed blocks between blocks that are in use. Every page of the object store that was touched
    stays in the resident set; the page is in shared memory, and is mapped again when it is read again. Nothing is
    released where little was added since the last time.
    """
    global _least_resident
    if sys.platform != "linux":
        return
    process = psutil.Process()
    resident = process.memory_info().rss
    if resident < _least_resident + _WORTH_RELEASING:
        # What was freed by others must not count as room.
        _least_resident = min(_least_resident, resident)
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, modes, *_ = line.split()
        # Only shared mappings: releasing a private page would lose its content.
        if modes.endswith("s") and "/plasma" in line:
            first, last = (int(bound, 16) for bound in span.split("-"))
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
    _least_resident = process.memory_info().rss


def cpu_seconds() -> float:
    """CPU seconds of all threads of this process so far, without its children."""
    return time.process_time()


def machine() -> dict[str, Any]:
    """Facts of the machine: host, platform, python, cpu (model), cores, memory_bytes, gpus (names)."""
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpu_names(),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32, in matrix units (AMX) or in vectors (AVX-512 BF16).

    Without these instructions float32 products are several times faster. The vectors make bfloat16 twice as fast on
    AMD's processors and half as fast on Intel's, which, unless a hypervisor hides them, have the matrix units as well.
    """
    try:
        description = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return " amx_bf16" in description or (" avx512_bf16" in description and "GenuineIntel" not in description)


def cpu_model() -> str:
    """Model name of the first CPU, or the architecture if the model is unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Names of the machine's NVIDIA GPUs.

    They are read from nvidia-smi, because torch would create a CUDA context, which holds memory on the GPU.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        result = subprocess.run(
            [command, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]


def package_version() -> str:
    """Version of the installed distribution; `unknown` if hasten runs without an installation."""
    try:
        return importlib.metadata.version("hasten")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with `-dirty` if files differ; None outside a checkout."""
    root = _ROOT
    # A package that is installed inside another repository must not report that repository's commit.
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return None


def git_diff() -> str | None:
    """Diff to the commit of the checkout that this code runs from; None outside a checkout."""
    root = _ROOT
    if not (root / ".git").exists():
        return None
    try:
        return _git(root, "diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    # errors="replace", because a diff may contain text in any encoding.
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    return result.stdout.strip()
