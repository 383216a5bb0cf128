"""A second process that owns a folder."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLD = "import fcntl, sys, time; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True)"


@contextmanager
def held(file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", f"{_HOLD}; time.sleep(600)", str(file)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()
