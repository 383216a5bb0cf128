"""Results of `hasten decode` in JSON Lines: each is written as it finishes, and a resumed run keeps earlier ones."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypedDict, cast

from hasten.accel.errors import UserError, is_disk_full


class Record(TypedDict):
    """A line of the file.

    completion: text before a stop string, without special tokens; None if the target has no tokenizer. token_ids: all
    decoded ids, including a final stop token and those of a stop string. stopped_by: that token or string; None if the
    completion has the maximum length. figures: counts and metrics by name.
    """

    id: object
    completion: str | None
    token_ids: list[int]
    prompt_token_ids: list[int]
    ended: str
    stopped_by: str | int | None
    figures: dict[str, Any]


class Completions:
    """A file of results, a context while it is written. The settings behind the results are in FILE.meta.json."""

    def __init__(self, path: Path, settings: Mapping[str, object], overwrite: bool) -> None:
        self.path = path
        self._meta = path.with_name(path.name + ".meta.json")
        self._settings = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self._file: BinaryIO | None = None

    def kept(self) -> dict[str, Record]:
        """Earlier results by id as text; UserError if another run, or something else, wrote them. Writes nothing."""
        self._check_place()
        if self._is_new():
            return {}
        if not self._meta.is_file():
            raise UserError(f"output={self.path} holds something else: give a file that is new or empty")
        if self._overwrite:
            return {}
        try:
            differing = _differences(json.loads(self._meta.read_bytes()), self._settings)
        except ValueError:
            raise UserError(f"{self._meta} is no JSON: give another output, or overwrite=true to start again") from None
        if differing:
            raise UserError(
                f"output={self.path} was begun with other settings ({'; '.join(differing)}): run with those, "
                "give another output, or overwrite=true to start again"
            )
        lines, _ = self._lines()
        return {str(record["id"]): record for record in lines}

    def __enter__(self) -> Self:
        """Open the file for appending, without the incomplete last line of a killed run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(f"another run writes output={self.path}: wait for it, or give another output") from None
        self._file = file
        if self._overwrite or self._is_new():
            # Empty the file before its settings change: after a kill in between, it counts as new.
            self.path.write_bytes(b"")
            self._meta.write_text(json.dumps(self._settings, indent=2) + "\n", encoding="utf-8")
        else:
            _, whole = self._lines()
            os.truncate(self.path, whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            self._file.close()
        except OSError:  # the disk is still full, and close() tried to write the rest
            if error is None:
                raise

    def write(self, record: Record) -> None:
        """Append a result; when this returns, it is on the disk."""
        assert self._file is not None
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise UserError(
                f"the disk is full while writing {self.path}: make space and run the same command again; "
                "what is finished is kept"
            ) from None

    def _is_new(self) -> bool:
        return not self.path.exists() or self.path.stat().st_size == 0

    def _check_place(self) -> None:
        existing = self.path
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        if existing == self.path and not existing.is_file():
            raise UserError(f"output={self.path} is no file: give a file that is new or an earlier run's")
        if existing != self.path and not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise UserError(f"output={self.path} cannot be made: {existing} is no folder that can be written to")

    def _lines(self) -> tuple[list[Record], int]:
        """Results, and the number of bytes of their lines; an incomplete last line is left out."""
        records: list[Record] = []
        whole = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None and number == len(lines):
                break
            if not isinstance(record, dict) or "id" not in record:
                raise UserError(f"output={self.path}, line {number} is no result: mend it, or overwrite=true")
            records.append(cast(Record, record))
            whole += len(line)
        return records, whole


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    return [
        f"{key}: {old.get(key)}, now {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
