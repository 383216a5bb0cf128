"""Outputs at a URI: a run writes a local mirror, which is downloaded first and uploaded as it grows.

Files that mark an output as complete (config.json, the index of its shards, …) are uploaded last, and removed first
when the output is replaced, so that an interrupted output is visibly incomplete. Notes beside the mirror list what was
uploaded, so that a run after a kill uploads only the rest. A changed file is recognised by its time of change, because
its size may be the same, for instance with another seed.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hasten.accel.errors import UserError
from hasten.accel.outputs.resumable import write_whole
from hasten.cluster.storage.remote import Entry, Progress, Remote, check_space, get_all, locked, writable

_LOG = logging.getLogger(__name__)
# Endings of files that identify an output, which are uploaded first: without them, fetch() would refuse the rest.
_FIRST = ("fingerprint.json", "source.json", "settings.json", ".meta.json")
# Files that mark an output as complete, in the order in which they are uploaded.
_LAST = (
    "quantization_config.json",
    "recipe.yaml",
    "model.safetensors.index.json",
    "config.json",
    "database.json",
    "report.json",
)
# Files of which every output folder of hasten has one.
_MARKS = (".hasten/fingerprint.json", "state/settings.json", "config.yaml")
# Endings of the files beside an output that is a single file: its settings.
_BESIDE = (".meta.json",)


@dataclass(frozen=True)
class _Sent:
    """An uploaded file: size and time of change (ns) of the local file, and the store's version, None if unknown."""

    size: int
    changed: int
    version: str | None


class Mirror:
    """Local mirror of an output at a URI. path: the local path. option: the option with the URI, for messages."""

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
        """Context with the output's lock, in which no other process writes the same output."""
        uri, option = self._remote.uri, self._remote.option
        with writable(self._cache, option, uri):
            self._folder.mkdir(parents=True, exist_ok=True)
        busy = f"another run writes {option}={uri}: wait for it, or give another {option}"
        with locked(self._folder.with_suffix(".lock"), busy):
            yield

    def fetch(self, progress: Progress | None = None) -> None:
        """Download the files that the mirror lacks; files of a killed run are kept, unless the store has changed.

        UserError if the URI is not writable, or contains something that hasten did not write.
        """
        self._remote.check_writable()
        files = self._remote.files(*_BESIDE)
        below = {name.partition("/")[2] for name in files}
        if any(below) and not any(mark in below for mark in _MARKS):
            option, uri = self._remote.option, self._remote.uri
            raise UserError(f"{option}={uri} holds something else, not an output of hasten: give a new or empty URI")
        self._read_notes()
        if self._is_outdated(files):
            _LOG.warning(
                "%s has changed since an earlier run; discarding that run's local files in %s",
                self._remote.uri,
                self.path,
            )
            self.discard()
        for name in [name for name, sent in self._sent.items() if sent and not (self._folder / name).exists()]:
            # The local file was deleted by hand, for instance to free space: it is downloaded again.
            self._forget(name)
        missing = {name: entry for name, entry in files.items() if name not in self._sent}
        check_space(self._folder, missing, f"{self._remote.option}={self._remote.uri}")

        def note(name: str) -> None:
            self._note(name, self._state(name, files[name].version))

        get_all(self._remote, self._folder, files, missing, progress, note)

    def push(self, final: bool = True, progress: Progress | None = None) -> int:
        """Upload new and changed files, and remove deleted ones from the store; returns the number of uploaded files.

        final: also upload the files that mark the output as complete, and check that the store has all files.
        """
        local = {name: state for name in self._names() if (state := self._state(name)) is not None}
        if final:
            files = self._remote.files(*_BESIDE)
            for name, sent in list(self._sent.items()):
                if sent is not None and (name not in files or files[name].size != sent.size):
                    self._note(name, None)
        changed = [name for name in local if not _same(self._sent.get(name), local[name])]
        deleted = [name for name in self._sent if name not in local]
        if any(not _is_last(name) for name in (*changed, *deleted)):
            # First, so that a mixture of old and new files is not marked as complete.
            for name in [name for name in self._sent if _is_last(name) and name in (*changed, *deleted)]:
                self._note(name, None)
                self._remote.remove(name)
        for name in deleted:
            self._note(name, None)
            self._remote.remove(name)
            self._forget(name)
        waiting = sorted((name for name in changed if final or not _is_last(name)), key=_upload_order)
        total = sum(local[name].size for name in waiting)
        done = 0
        for name in waiting:
            # If the run is killed during the upload, the local file is uploaded again.
            self._note(name, None)
            try:
                self._remote.put(self._folder / name, name)
            except UserError:
                if (self._folder / name).exists():
                    raise
                continue  # the run deleted it meanwhile
            self._note(name, local[name])
            done += local[name].size
            if progress is not None:
                progress(done, total)
        if final and waiting:
            for name, entry in self._remote.files(*_BESIDE).items():
                sent = self._sent.get(name)
                if sent is not None:
                    self._note(name, _Sent(sent.size, sent.changed, entry.version))
        return len(waiting)

    def discard(self) -> None:
        """Delete all local files."""
        # The notes first: files that are noted as uploaded but missing locally would be removed from the store.
        self._notes.unlink(missing_ok=True)
        self._sent = {}
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def _is_outdated(self, files: dict[str, Entry]) -> bool:
        """Whether the store lost or changed an uploaded file, or has a file that the mirror has but never uploaded."""
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
            status = (self._folder / name).stat()
        except FileNotFoundError:  # deleted meanwhile
            return None
        return _Sent(status.st_size, status.st_mtime_ns, version)

    def _note(self, name: str, sent: _Sent | None) -> None:
        """Note that a file is uploaded; None: the store may have it in an unknown state, and it is not uploaded."""
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
            except ValueError:  # a line that is incomplete because the process was killed
                continue
            if sent:
                self._sent[name] = None if sent[0] is None else _Sent(*sent[0])
            else:
                self._sent.pop(name, None)
        text = "".join(_line(name, sent) for name, sent in self._sent.items())
        write_whole(self._notes, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _line(name: str, *sent: _Sent | None) -> str:
    """Line of the notes; one with the name alone means that the file was removed."""
    return json.dumps([name, *(state and [state.size, state.changed, state.version] for state in sent)]) + "\n"


def _same(sent: _Sent | None, local: _Sent) -> bool:
    return sent is not None and (sent.size, sent.changed) == (local.size, local.changed)


def _is_last(name: str) -> bool:
    return name.rpartition("/")[2] in _LAST


def _upload_order(name: str) -> tuple[int, str]:
    """Sort key of a file in the order of uploads."""
    file = name.rpartition("/")[2]
    if file in _LAST:
        return 1 + _LAST.index(file), name
    return (-1 if name.endswith(_FIRST) else 0), name
