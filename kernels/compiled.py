"""Compiles a kernel's C source for this machine's processor, once per machine.

The shared library is cached under a hash of source, compiler, options and processor. Without a working compiler, the
op runs its torch reference.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from hasten.kernels.cache import default_cache

# OpenMP is not linked: its symbols come from the copy that torch has loaded. A second copy would start its own threads,
# which would compete with torch's for the cores.
_OPTIONS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC")
_TIMEOUT_SECONDS = 120


@cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """The library compiled from a C file; None if it cannot be compiled."""
    compiler = _compiler()
    path = library_path(source)
    with suppress(OSError, subprocess.SubprocessError):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, path)
        return ctypes.CDLL(str(path))
    # The cache folder is not writable, is full, or is mounted noexec: compile into a temporary folder instead.
    with suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, path.name)
        _compile(compiler, source, path)
        return ctypes.CDLL(str(path))
    return None


def library_path(source: Path) -> Path:
    """Where the library of a C file is cached; the name depends on all that its code depends on."""
    compiler = _compiler()
    key = hashlib.sha256()
    for file in (source, *_included(source)):
        key.update(file.read_bytes() + b"\0")
    for part in (*compiler, *_OPTIONS, _version(compiler), _processor()):
        key.update(part.encode() + b"\0")
    return default_cache().expanduser() / "kernels" / f"{source.stem}-{key.hexdigest()[:16]}.so"


def _included(source: Path) -> list[Path]:
    """The files of this package that a source includes; these include none."""
    names = re.findall(r'(?m)^#include "(.+)"$', source.read_text())
    return [source.parent / name for name in names]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or "cc")


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        object_file, temporary = Path(folder, "kernel.o"), Path(folder, library.name)
        for command in (
            [*compiler, *_OPTIONS, "-c", str(source), "-o", str(object_file)],
            [*compiler, "-shared", str(object_file), "-o", str(temporary)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_SECONDS)
        # An atomic rename, because other processes may compile the same source.
        temporary.replace(library)


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    """Model and instruction set of the processor, because machines with different ones may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.lower().startswith(("flags", "features", "model", "cpu part"))})
    )
