"""A run's journal: what a point of a sweep tells, in a file, from which one process writes to MLflow.

A point that is killed leaves a journal that can be read; one that starts again begins a new one with a new attempt.
"""

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from hasten.cluster.tracking.events import Event, decode, encode

FILE = "events.jsonl"
_current: "Journal | None" = None


class Journal:
    """Writes events as lines; each is in the file when `write` comes back."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Named anew, not emptied: a reader of the earlier attempt sees another file, never a cut line.
        unfinished = folder / f".{FILE}.{uuid.uuid4().hex}"
        self._file = unfinished.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._line(json.dumps({"attempt": uuid.uuid4().hex}))
        unfinished.replace(folder / FILE)

    def write(self, event: Event) -> None:
        """Append an event; any thread may."""
        self._line(encode(event))

    def close(self) -> None:
        """No more events."""
        self._file.close()

    def _line(self, text: str) -> None:
        with self._lock:
            self._file.write(text + "\n")
            self._file.flush()


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Inside the block every Tracker of this process writes to the folder's journal, and not to MLflow."""
    global _current
    _current = Journal(folder)
    try:
        yield
    finally:
        _current.close()
        _current = None


def current() -> Journal | None:
    """Where Trackers of this process write, if not to MLflow."""
    return _current


class Reader:
    """Reads a journal that is being written. attempt: the one that events come from; empty before there is a file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.attempt = ""
        self._position = 0

    def read(self) -> tuple[bool, list[Event]]:
        """Whether another attempt has begun since the last call, and the events that are new, whole lines only."""
        try:
            with self._path.open("rb") as file:
                attempt = json.loads(file.readline())["attempt"]
                begins = attempt != self.attempt
                if begins:
                    self.attempt, self._position = attempt, file.tell()
                file.seek(self._position)
                lines = file.read()
        except FileNotFoundError:
            return False, []
        lines = lines[: lines.rfind(b"\n") + 1]
        self._position += len(lines)
        return begins, [decode(line) for line in lines.decode().split("\n")[:-1]]
