"""Output folder of a run that can be resumed: ownership of the folder, and atomic writes.

A file is written under a unique temporary name, synced and renamed, so that processes that write the same file at the
same time do not conflict. `.hasten` in the folder holds the fingerprint of everything that determines the folder's
bytes. A run with a different fingerprint is refused, unless only settings differ that affect memory and at most the
last bits of results. A second run is also refused while another one writes the folder.
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

from hasten.accel.errors import UserError, is_disk_full
from hasten.accel.models import embedded
from hasten.accel.outputs import lock

PROGRESS = ".hasten"
_FINGERPRINT = "fingerprint.json"
_SOURCE = "source.json"
_LOCK = "lock"
# Settings that a resumed run may change, for example after running out of memory: only last bits of results differ.
_MAY_CHANGE = ("batch", "threads")
# Time to wait for a run that was just killed to end.
_SECONDS_TO_END = 5.0
# Maximum number of changed modules that a message names.
_NAMED = 3


class ResumableFolder:
    """Output folder of a run. source: the checkpoint that it is made from.

    option: the job option that names the folder. last_file: the file that is written last. open_to_all: folders inside
    to which other runs may write.
    """

    option: ClassVar[str] = "output"
    last_file: ClassVar[str] = "config.json"
    open_to_all: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.source = source
        # Recorded in the folder for finding the original; callers may set it, for example to the URI of a download.
        self.source_name = embedded.reference(source)

    @property
    def is_complete(self) -> bool:
        """Whether the folder is complete."""
        return (self.path / self.last_file).exists()

    @property
    def fingerprint(self) -> dict[str, object]:
        """The fingerprint that the folder was made with."""
        fingerprint: dict[str, object] = json.loads((self.path / PROGRESS / _FINGERPRINT).read_text())
        return fingerprint

    def check(self, fingerprint: Mapping[str, object], overwrite: bool) -> None:
        """UserError where `open` would refuse the folder; nothing is written.

        A folder is refused where it holds other files, or was begun with other settings, which the message names.
        """
        existing = self.path
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        if existing == self.path and not existing.is_dir():
            raise UserError(f"{self.option}={self.path} is a file: give a folder that is new or empty")
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{self.option}={self.path} cannot be made: {existing} is no folder that can be written to")
        if self._is_new():
            return
        if not (self.path / PROGRESS / _FINGERPRINT).exists():
            raise UserError(f"{self.option}={self.path} holds something else: give a folder that is new or empty")
        differing = _differences(lasting(self.fingerprint), lasting(fingerprint))
        if differing and not overwrite:
            raise UserError(
                f"{self.option}={self.path} was begun with other settings ({'; '.join(differing)}): "
                f"run with those, give another {self.option}, or overwrite=true to start again"
            )

    def changed(self, fingerprint: Mapping[str, object]) -> list[str]:
        """`key: old value, now new value` for every entry of this fingerprint that differs from the folder's."""
        return _differences(self.fingerprint, fingerprint)

    def open(self, fingerprint: Mapping[str, object], overwrite: bool) -> None:
        """Create the folder, or resume in one that a run with this fingerprint left; UserError as in `check`.

        This process owns the folder until `release`; UserError where another process owns it.
        """
        self.check(fingerprint, overwrite)
        if not self.hold(_SECONDS_TO_END):
            raise UserError(f"another run writes {self.option}={self.path}: wait for it, or give another {self.option}")
        try:
            # Another run may have written to the folder until now.
            self.check(fingerprint, overwrite)
            self._begin(fingerprint, overwrite)
        except BaseException:
            self.release()
            raise

    def hold(self, seconds: float = 0.0) -> bool:
        """Take ownership of the folder; False where another process owns it for this many seconds."""
        taken = []

        def take() -> None:
            try:
                (self.path / PROGRESS).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if is_disk_full(error):
                    raise
                reason = error.strerror or type(error).__name__
                raise UserError(f"{self.option}={self.path} cannot be made ({reason}): give another folder") from None
            taken.append(lock.take(self.path / PROGRESS / _LOCK, seconds))

        guard(PROGRESS, take)
        return taken[0]

    def release(self) -> None:
        """Give up ownership of the folder."""
        lock.give_back(self.path / PROGRESS / _LOCK)

    def write_tensors(self, path: Path, tensors: dict[str, Tensor], note: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file atomically. note: its metadata; None is the usual {"format": "pt"}.

        The metadata must have one entry: safetensors writes several entries in a random order.
        """
        from safetensors.torch import save_file

        metadata = dict(note or {"format": "pt"})
        assert len(metadata) == 1
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata), needed)

    def write_json(self, path: Path, content: object) -> None:
        """Write a JSON file atomically."""
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))

    def _begin(self, fingerprint: Mapping[str, object], overwrite: bool) -> None:
        """Remove leftovers of an earlier run, and record the source and the fingerprint of this one."""
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
        """Whether the folder is missing, empty, or as a run leaves it that is killed while it creates the folder."""
        progress = self.path / PROGRESS
        begun = {progress, progress / _SOURCE, progress / _LOCK}
        return not self.path.exists() or all(
            path in begun or (path.parent == progress and path.suffix == ".tmp") for path in self.path.rglob("*")
        )

    def _clear(self) -> None:
        """Empty the folder of an earlier run.

        If this is killed half way, the fingerprint still marks the folder as a run's, and it does not look complete.
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
    """The entries of a fingerprint that a resumed run may not change."""
    return {key: value for key, value in fingerprint.items() if key not in _MAY_CHANGE}


def digest(fingerprint: object) -> str:
    """Digest of JSON values: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def source_name(folder: Path) -> str | None:
    """Recorded source of a folder: a path, embedded:NAME, or a URI; None where none is recorded."""
    file = folder / PROGRESS / _SOURCE
    return json.loads(file.read_text())["original"] if file.is_file() else None


def original_of(folder: Path) -> Path | None:
    """Checkpoint that a folder was made from; None where it is not recorded or no longer exists."""
    name = source_name(folder)
    original = None if name is None else embedded.from_reference(name)
    return original if original is not None and original.is_dir() else None


def write_whole(path: Path, save: Callable[[Path], object], needed: int = 0) -> None:
    """Write a file atomically: under a temporary name, then renamed. The temporary file is removed on errors.

    save(temporary) writes about `needed` bytes; UserError where the disk is full.
    """
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp")

    def write() -> None:
        # safetensors makes files that only their owner may read: this one gets the mode that others get.
        temporary.touch()
        mode = temporary.stat().st_mode
        save(temporary)
        temporary.chmod(mode)
        _replace(temporary, path)

    try:
        guard(path.name, write, needed)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file durably: after a power failure there is either the old file or the new one."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def guard(name: str, write: Callable[[], object], needed: int = 0) -> None:
    """Run write(); UserError, which says what to do, where the disk is full."""
    try:
        write()
    except Exception as error:
        if not is_disk_full(error):
            raise
        size = f" ({needed / 2**20:.0f} MiB)" if needed else ""
        raise UserError(
            f"the disk is full while writing {name}{size}: make space and run the same command again; "
            f"what is finished is kept"
        ) from None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old value, now new value` for every entry that differs; for a dict of digests, the names that differ."""
    differences = []
    for key in dict.fromkeys([*old, *new]):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                differences.append(f"{key} of {', '.join(names[:_NAMED])}{more}")
        elif before != now:
            differences.append(f"{key}: {_short(before)}, now {_short(now)}")
    return differences


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
