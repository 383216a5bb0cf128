"""Journals: a point of a sweep writes its events to a file, from which the sweep's driver writes them to MLflow.

The journal of a killed point remains readable. Each new attempt of a point starts a new journal.
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
    """Writes events as lines; an event is in the file when `write` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # A new file is renamed into place, so that a reader of the earlier attempt never sees an incomplete line.
        unfinished = folder / f".{FILE}.{uuid.uuid4().hex}"
        self._file = unfinished.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._line(json.dumps({"attempt": uuid.uuid4().hex}))
        unfinished.replace(folder / FILE)

    def write(self, event: Event) -> None:
        """Append an event; thread-safe."""
        self._line(encode(event))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _line(self, text: str) -> None:
        with self._lock:
            self._file.write(text + "\n")
            self._file.flush()


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Context in which every Tracker of this process writes to the folder's journal, and not to MLflow."""
    global _current
    _current = Journal(folder)
    try:
        yield
    finally:
        _current.close()
        _current = None


def current() -> Journal | None:
    """The journal that Trackers of this process write to; None if they write to MLflow."""
    return _current


class Reader:
    """Reads a journal while it is being written. attempt: id of the attempt that was read; empty before the first."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.attempt = ""
        self._position = 0

    def read(self) -> tuple[bool, list[Event]]:
        """Whether a new attempt has begun since the last call, and the new events; incomplete lines are left unread."""
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
