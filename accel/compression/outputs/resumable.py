"""A folder that a run fills and a killed run goes on with: whose it is, and files written whole or not at all.

A file is written under a temporary name of its own, synced and renamed: processes that write the same at the same time
do not meet. In `.hasten` stands the fingerprint of everything that decides the folder's bytes; a run with another one
is refused, but for what memory asks for and the last bits alone depend on, and so is a second run while one is at it.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hasten.accel.compression.outputs import lock
from hasten.accel.errors import UserError, is_disk_full
from hasten.accel.models import embedded

PROGRESS = ".hasten"
_FINGERPRINT = "fingerprint.json"
_SOURCE = "source.json"
_LOCK = "lock"
# What may change while a folder is made, as when memory ran out: results differ by the last bits at most.
_MAY_CHANGE = ("batch", "threads")
# A run that was just killed may take so long to end.
_SECONDS_TO_END = 5.0
# Names of changed modules in a message.
_NAMED = 3


class ResumableFolder:
    """A folder in the making. source: the checkpoint that it is made from.

    option: what users call the folder. last_file: what a complete one has. open_to_all: folders in it that other runs
    write, too.
    """

    option: ClassVar[str] = "output"
    last_file: ClassVar[str] = "config.json"
    open_to_all: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.source = source
        # What is noted of it, for those who look for the original: such as the URI that it was copied from.
        self.source_name = embedded.reference(source)

    @property
    def is_complete(self) -> bool:
        """Whether everything is there."""
        return (self.path / self.last_file).exists()

    @property
    def fingerprint(self) -> dict[str, object]:
        """The fingerprint that the folder was made with."""
        found: dict[str, object] = json.loads((self.path / PROGRESS / _FINGERPRINT).read_text())
        return found

    def check(self, fingerprint: Mapping[str, object], overwrite: bool) -> None:
        """UserError where `open` would refuse the folder; writes nothing.

        It is refused where it holds something else, or was begun with other settings: the message says which differ.
        """
        here = self.path
        while not os.path.lexists(here) and here != here.parent:
            here = here.parent
        if here == self.path and not here.is_dir():
            raise UserError(f"{self.option}={self.path} is a file: give a folder that is new or empty")
        if not here.is_dir() or not os.access(here, os.W_OK | os.X_OK):
            raise UserError(f"{self.option}={self.path} cannot be made: {here} is no folder that can be written to")
        if self._is_new():
            return
        kept = self.path / PROGRESS / _FINGERPRINT
        if not kept.exists():
            raise UserError(f"{self.option}={self.path} holds something else: give a folder that is new or empty")
        differing = _differences(lasting(self.fingerprint), lasting(fingerprint))
        if differing and not overwrite:
            raise UserError(
                f"{self.option}={self.path} was begun with other settings ({'; '.join(differing)}): "
                f"run with those, give another {self.option}, or overwrite=true to start again"
            )

    def changed(self, fingerprint: Mapping[str, object]) -> list[str]:
        """`key: old value, now new value` for what a run with this fingerprint does otherwise than the first one."""
        return _differences(self.fingerprint, fingerprint)

    def open(self, fingerprint: Mapping[str, object], overwrite: bool) -> None:
        """Make the folder, or go on in one that the same run left behind; UserError as in `check`.

        It is this process's until `release`, or refused where it is another's.
        """
        self.check(fingerprint, overwrite)
        if not self.hold(_SECONDS_TO_END):
            raise UserError(f"another run writes {self.option}={self.path}: wait for it, or give another {self.option}")
        try:
            # Another run may have been at it until now.
            self.check(fingerprint, overwrite)
            self._begin(fingerprint, overwrite)
        except BaseException:
            self.release()
            raise

    def hold(self, seconds: float = 0.0) -> bool:
        """Make the folder this process's own; False where it has been another's for so many seconds."""
        taken = []

        def take() -> None:
            (self.path / PROGRESS).mkdir(parents=True, exist_ok=True)
            taken.append(lock.take(self.path / PROGRESS / _LOCK, seconds))

        guard(PROGRESS, take)
        return taken[0]

    def release(self) -> None:
        """Let others have the folder."""
        lock.give_back(self.path / PROGRESS / _LOCK)

    def write_tensors(self, path: Path, tensors: dict[str, Tensor], note: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file whole or not at all; its metadata are note, or say that torch wrote it.

        Only one entry: safetensors writes several in another order every time.
        """
        from safetensors.torch import save_file

        metadata = dict(note or {"format": "pt"})
        assert len(metadata) == 1
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata), needed)

    def write_json(self, path: Path, content: object) -> None:
        """Write a JSON file whole or not at all."""
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))

    def _begin(self, fingerprint: Mapping[str, object], overwrite: bool) -> None:
        """Throw away what is not to stay of an earlier run, and note whose the folder is."""
        progress = self.path / PROGRESS
        if overwrite and not self._is_new():
            self._clear()
        for leftover in self.path.rglob("*.tmp"):
            if leftover.relative_to(self.path).parts[0] not in self.open_to_all:
                leftover.unlink(missing_ok=True)
        if not (progress / _FINGERPRINT).exists():
            self.write_json(progress / _SOURCE, {"original": self.source_name})
            self.write_json(progress / _FINGERPRINT, dict(fingerprint))

    def _is_new(self) -> bool:
        """Whether the folder is missing, empty, or as a run leaves it that was killed while it made the folder."""
        progress = self.path / PROGRESS
        begun = {progress, progress / _SOURCE, progress / _LOCK}
        return not self.path.exists() or all(
            path in begun or (path.parent == progress and path.suffix == ".tmp") for path in self.path.rglob("*")
        )

    def _clear(self) -> None:
        """Empty the folder of an earlier run.

        Killed half way, it is still known as a run's, by the fingerprint, and not taken for complete.
        """
        (self.path / self.last_file).unlink(missing_ok=True)
        kept = self.path / PROGRESS / _FINGERPRINT
        lock_file = kept.with_name(_LOCK)
        for path in [*self.path.iterdir(), *kept.parent.iterdir()]:
            if path.is_dir() and not path.is_symlink():
                if path != kept.parent:
                    shutil.rmtree(path)
            elif path not in (kept, lock_file):
                path.unlink()
        kept.unlink()


def lasting(fingerprint: Mapping[str, object]) -> dict[str, object]:
    """What of a fingerprint may not change while a folder is made."""
    return {key: value for key, value in fingerprint.items() if key not in _MAY_CHANGE}


def digest(fingerprint: object) -> str:
    """Short name of plain values: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def source_name(folder: Path) -> str | None:
    """What a folder was made from, as it is noted in it: a path, embedded:NAME, or a URI."""
    noted = folder / PROGRESS / _SOURCE
    return json.loads(noted.read_text())["original"] if noted.is_file() else None


def original_of(folder: Path) -> Path | None:
    """Checkpoint that a folder was made from, if that is noted in it and still there."""
    noted = source_name(folder)
    original = None if noted is None else embedded.referred(noted)
    return original if original is not None and original.is_dir() else None


def write_whole(path: Path, save: Callable[[Path], object], needed: int = 0) -> None:
    """Write a file under another name and rename it; what a full disk could not hold does not stay on it.

    save(temporary) writes about `needed` bytes; UserError where the disk is full.
    """
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp")

    def write() -> None:
        save(temporary)
        _replace(temporary, path)

    try:
        guard(path.name, write, needed)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file into place so that a power cut leaves the old state or the new one."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def guard(name: str, write: Callable[[], object], needed: int = 0) -> None:
    """Run write(); a full disk becomes a UserError that says what to do."""
    try:
        write()
    except Exception as error:
        if not is_disk_full(error):
            raise
        wanted = f" ({needed / 2**20:.0f} MiB)" if needed else ""
        raise UserError(
            f"the disk is full while writing {name}{wanted}: make space and run the same command again; "
            f"what is finished is kept"
        ) from None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old value, now new value` for every entry that differs; of digests by name, the names that differ."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                found.append(f"{key} of {', '.join(names[:_NAMED])}{more}")
        elif before != now:
            found.append(f"{key}: {_short(before)}, now {_short(now)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
