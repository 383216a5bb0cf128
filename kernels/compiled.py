"""C beside the Python of a kernel, compiled for the processor it runs on, once for each machine.

The library is kept in the cache under a name of the source, the compiler and the processor. Where there is no compiler,
or it fails, there is no library, and callers do without.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from hasten.kernels.cache import default_cache

# OpenMP's symbols are those of torch, which is loaded before: a second copy of OpenMP would have threads of its own,
# which fight with torch's for the processors. Hence nothing is linked.
_OPTIONS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC")
_SECONDS = 120


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """A C file as a library; None where it cannot be compiled."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    key = hashlib.sha256(source.read_bytes())
    for part in (*compiler, *_OPTIONS, _version(compiler), _processor()):
        key.update(part.encode() + b"\0")
    name = f"{source.stem}-{key.hexdigest()[:16]}.so"
    with suppress(OSError, subprocess.SubprocessError):
        made = default_cache().expanduser() / "kernels" / name
        if not made.is_file():
            made.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, made)
        return ctypes.CDLL(str(made))
    with suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory() as folder:
        # The cache is not writable, or full, or forbids what is executable.
        made = Path(folder, name)
        _compile(compiler, source, made)
        return ctypes.CDLL(str(made))
    return None


def _compile(compiler: list[str], source: Path, made: Path) -> None:
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        parts, whole = Path(folder, "parts.o"), Path(folder, made.name)
        for command in (
            [*compiler, *_OPTIONS, "-c", str(source), "-o", str(parts)],
            [*compiler, "-shared", str(parts), "-o", str(whole)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        # At once: other processes compile the same.
        whole.replace(made)


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    """What tells processors apart that do not run the same instructions: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = [line for line in lines if line.lower().startswith(("flags", "features", "model", "cpu part"))]
    return "\n".join(sorted(set(told)))
