"""An output behind a URI: it is made in a local folder, fetched first and sent as it grows.

What says that an output is complete (config.json, the index of its shards, …) is sent last, and removed first where
something else is to replace it: an output that was interrupted is visibly unfinished. Beside the folder stands what
the store has of it, so that a run that was killed sends only the rest, and so that files count as sent by what they
are and not by their size, which another seed does not change.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hasten.accel.compression.outputs.resumable import write_whole
from hasten.accel.errors import UserError
from hasten.cluster.storage.remote import Entry, Progress, Remote, check_space, get_all, locked, writable

_LOG = logging.getLogger(__name__)
# What tells whose an output is: without it the rest would be taken for something else.
_FIRST = ("fingerprint.json", "source.json", "settings.json", ".meta.json")
# What a finished one has, in the order in which it is sent.
_LAST = (
    "quantization_config.json",
    "recipe.yaml",
    "model.safetensors.index.json",
    "config.json",
    "database.json",
    "report.json",
)
_MARKS = (".hasten/fingerprint.json", "state/settings.json", "config.yaml")
# Results in a file have their settings beside them.
_BESIDE = (".meta.json",)


@dataclass(frozen=True)
class _Sent:
    """A local file that the store has: size and time of change here, and what the store says of it, None if unasked."""

    size: int
    changed: int
    version: str | None


class Mirror:
    """A local path (`path`) for an output at a URI. option: whose value it is, for messages."""

    def __init__(self, uri: str, cache: Path, option: str = "output") -> None:
        self._remote = Remote(uri, option)
        key = hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:16]
        self._cache = cache
        self._folder = cache.expanduser().absolute() / "outputs" / key
        self._notes = self._folder.with_suffix(".jsonl")
        self._sent: dict[str, _Sent | None] = {}
        self.path = self._folder / self._remote.name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which no other process writes the same output."""
        uri, option = self._remote.uri, self._remote.option
        with writable(self._cache, option, uri):
            self._folder.mkdir(parents=True, exist_ok=True)
        busy = f"another run writes {option}={uri}: wait for it, or give another {option}"
        with locked(self._folder.with_suffix(".lock"), busy):
            yield

    def fetch(self, progress: Progress | None = None) -> None:
        """Bring what the store has and is not here; what a killed run left here stays, unless the store has changed.

        UserError where the URI cannot be written to, or holds something that no run of hasten made.
        """
        self._remote.check_writable()
        files = self._remote.files(*_BESIDE)
        below = {name.partition("/")[2] for name in files}
        if any(below) and not any(mark in below for mark in _MARKS):
            option, uri = self._remote.option, self._remote.uri
            raise UserError(f"{option}={uri} holds something else: give a URI that is new or empty")
        self._read_notes()
        if self._is_outdated(files):
            _LOG.warning(
                "%s has changed since a run left files for it in %s: they are thrown away", self._remote.uri, self.path
            )
            self.discard()
        for name in [name for name, sent in self._sent.items() if sent and not (self._folder / name).exists()]:
            # No run removes a file before it is started: somebody made space.
            self._forget(name)
        missing = {name: entry for name, entry in files.items() if name not in self._sent}
        check_space(self._folder, missing, f"{self._remote.option}={self._remote.uri}")

        def note(name: str) -> None:
            self._note(name, self._state(name, files[name].version))

        get_all(self._remote, self._folder, files, missing, progress, note)

    def push(self, final: bool = True, progress: Progress | None = None) -> int:
        """Send what the store has not, or not as it is here, and remove there what went here; returns how many files.

        final: what makes the output complete is sent too, and the store is asked whether it has everything.
        """
        here = {name: state for name in self._names() if (state := self._state(name)) is not None}
        if final:
            files = self._remote.files(*_BESIDE)
            for name, sent in list(self._sent.items()):
                if sent is not None and (name not in files or files[name].size != sent.size):
                    self._note(name, None)
        changed = [name for name in here if not _same(self._sent.get(name), here[name])]
        gone = [name for name in self._sent if name not in here]
        if any(not _is_last(name) for name in (*changed, *gone)):
            # First, so that nobody takes a mixture of old and new for complete.
            for name in [name for name in self._sent if _is_last(name) and name in (*changed, *gone)]:
                self._note(name, None)
                self._remote.remove(name)
        for name in gone:
            self._note(name, None)
            self._remote.remove(name)
            self._forget(name)
        waiting = sorted((name for name in changed if final or not _is_last(name)), key=_turn)
        total = sum(here[name].size for name in waiting)
        done = 0
        for name in waiting:
            # Killed from here on, what is here counts and not what the store has.
            self._note(name, None)
            try:
                self._remote.put(self._folder / name, name)
            except UserError:
                if (self._folder / name).exists():
                    raise
                continue  # it went while the run goes on
            self._note(name, here[name])
            done += here[name].size
            if progress is not None:
                progress(done, total)
        if final and waiting:
            for name, entry in self._remote.files(*_BESIDE).items():
                sent = self._sent.get(name)
                if sent is not None:
                    self._note(name, _Sent(sent.size, sent.changed, entry.version))
        return len(waiting)

    def discard(self) -> None:
        """Throw away what is here."""
        # First: what is noted and not here would be removed from the store.
        self._notes.unlink(missing_ok=True)
        self._sent = {}
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def _is_outdated(self, files: dict[str, Entry]) -> bool:
        """Whether the store lacks a file that it had, or has another one, or one that is here and was never sent."""
        for name, sent in self._sent.items():
            if sent is not None and (
                name not in files or files[name].size != sent.size or sent.version not in (None, files[name].version)
            ):
                return True
        return any(name not in self._sent and (self._folder / name).exists() for name in files)

    def _names(self) -> list[str]:
        return sorted(
            path.relative_to(self._folder).as_posix()
            for path in self._folder.rglob("*")
            if path.is_file() and not path.name.endswith((".tmp", ".part"))
        )

    def _state(self, name: str, version: str | None = None) -> _Sent | None:
        try:
            found = (self._folder / name).stat()
        except FileNotFoundError:  # it went meanwhile
            return None
        return _Sent(found.st_size, found.st_mtime_ns, version)

    def _note(self, name: str, sent: _Sent | None) -> None:
        """Remember what the store has; None is what it may have, and what does not count."""
        self._sent[name] = sent
        self._write(_line(name, sent))

    def _forget(self, name: str) -> None:
        del self._sent[name]
        self._write(_line(name))

    def _write(self, line: str) -> None:
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(line)

    def _read_notes(self) -> None:
        self._sent = {}
        lines = self._notes.read_text(encoding="utf-8").splitlines() if self._notes.exists() else []
        for line in lines:
            try:
                name, *sent = json.loads(line)
            except ValueError:  # cut off when the process was killed: as if it had been killed before
                continue
            if sent:
                self._sent[name] = None if sent[0] is None else _Sent(*sent[0])
            else:
                self._sent.pop(name, None)
        text = "".join(_line(name, sent) for name, sent in self._sent.items())
        write_whole(self._notes, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _line(name: str, *sent: _Sent | None) -> str:
    """Line of the notes; without anything after the name it says that the file is gone."""
    return json.dumps([name, *(each and [each.size, each.changed, each.version] for each in sent)]) + "\n"


def _same(sent: _Sent | None, here: _Sent) -> bool:
    return sent is not None and (sent.size, sent.changed) == (here.size, here.changed)


def _is_last(name: str) -> bool:
    return name.rpartition("/")[2] in _LAST


def _turn(name: str) -> tuple[int, str]:
    """Place of a file in the order of sending."""
    file = name.rpartition("/")[2]
    if file in _LAST:
        return 1 + _LAST.index(file), name
    return (-1 if name.endswith(_FIRST) else 0), name
