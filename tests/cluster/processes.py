"""Processes of Ray that tests wait for, stop and kill."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil


def processes(name: str) -> list[psutil.Process]:
    """Ray's processes below this one that are named so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(name in word for word in process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def stopped(process: psutil.Process) -> Iterator[psutil.Process]:
    """A process that stands still."""
    process.suspend()
    try:
        yield process
    finally:
        process.resume()
