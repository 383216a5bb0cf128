"""Whose folder it is: two runs that write one folder at the same time would each take the other's files for its own.

The lock is the system's, on a file: it ends with the process, however that ends. Where a file system has none, nobody
is kept out.
"""

import fcntl
import time
from pathlib import Path
from typing import IO

# By the file: several of this process's objects may stand for one folder.
_HELD: dict[Path, IO[bytes]] = {}
_SECONDS_BETWEEN_TRIES = 0.1


def take(file: Path, seconds: float = 0.0) -> bool:
    """Lock a file, which is made, for this process; False where another has had it for so many seconds."""
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
    """End the lock of a file, if this process has it."""
    opened = _HELD.pop(file.resolve(), None)
    if opened is not None:
        opened.close()
