"""What a process used and what it runs on."""

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

import hasten

# The checkout, where the code runs from one.
_ROOT = Path(hasten.__file__).resolve().parents[1]
_MADV_DONTNEED = 4


def peak_rss_bytes() -> int:
    """Most memory that this process has held, in bytes; mapped files count while they are mapped."""
    try:
        # ru_maxrss survives exec: a process started from a large one would report its parent's peak.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:  # no Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Hand memory that is not in use back to the system: freed blocks, and pages of Ray's object store.

    The C library keeps what lay between blocks still in use. Of the object store every page that was ever touched
    stays in a process's resident set; it lies in shared memory and is mapped again where it is read again.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, modes, *_ = line.split()
        # Letting go of a private page would lose what is in it.
        if modes.endswith("s") and "/plasma" in line:
            first, last = (int(bound, 16) for bound in span.split("-"))
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def cpu_seconds() -> float:
    """CPU seconds of this process so far, all threads together, without its children."""
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
    """Whether the CPU has matrix units for bfloat16; without them it multiplies float32 several times faster."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False


def cpu_model() -> str:
    """Model name of the first CPU, or the architecture's name where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # no Linux
        pass
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Names of the machine's NVIDIA GPUs.

    Asked of nvidia-smi, because torch would make a CUDA context, and hold memory on the GPU, to answer.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        found = subprocess.run(
            [command, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def package_version() -> str:
    """Version of the installed distribution; `unknown` where the packages are only on the path."""
    try:
        return importlib.metadata.version("hasten")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with `-dirty` where files differ; None outside of one."""
    root = _ROOT
    # An installed package inside somebody else's repository must not report that repository's commit.
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return None


def git_diff() -> str | None:
    """What differs from the commit in the checkout that this code runs from; None outside of one."""
    root = _ROOT
    if not (root / ".git").exists():
        return None
    try:
        return _git(root, "diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    # A diff holds lines in any encoding.
    command = ["git", "-C", str(root), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    return found.stdout.strip()
