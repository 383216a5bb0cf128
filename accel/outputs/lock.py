"""Lock of an output folder, so that two runs do not write to the same folder at the same time.

It is the operating system's lock on a file, which ends with the process, however that ends. On a file system without
locks there is no protection.
"""

import fcntl
import time
from pathlib import Path
from typing import IO

# Keyed by file, because several objects of this process may refer to the same folder.
_HELD: dict[Path, IO[bytes]] = {}
_SECONDS_BETWEEN_TRIES = 0.1


def take(file: Path, seconds: float = 0.0) -> bool:
    """Lock a file for this process and create it; False where another process holds it for this many seconds."""
    file = file.resolve()
    if file in _HELD:
        return True
    opened = file.open("ab")
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                opened.close()
                return False
            time.sleep(_SECONDS_BETWEEN_TRIES)
            continue
        except OSError:  # a file system without locks
            pass
        _HELD[file] = opened
        return True


def give_back(file: Path) -> None:
    """Unlock a file, if this process holds its lock."""
    opened = _HELD.pop(file.resolve(), None)
    if opened is not None:
        opened.close()
