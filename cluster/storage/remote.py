"""Files at a URI (s3, gs and all other schemes of fsspec), and local copies of inputs.

A copy is in CACHE/inputs/KEY/NAME, where KEY is a hash of the URI and of the size and version of every file. So a
changed input gets a new copy, and readers of the earlier copy are not disturbed. Files are renamed into place one by
one, so that an interrupted copy resumes with the missing files.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError, is_disk_full

_LOG = logging.getLogger(__name__)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FILE = "file://"
# Keys of a file's version in the listings of stores, most reliable first; times are the fallback.
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "checksum")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
_FILES_AT_ONCE = 4
# Other formats beside safetensors in a checkpoint's folder, which transformers does not read then.
_DUPLICATES = ("original/", "consolidated", "pytorch_model", "flax_model", "tf_model")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_CREDENTIALS = (
    "s3 reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, gs reads GOOGLE_APPLICATION_CREDENTIALS, "
    "any store fsspec's configuration"
)
Progress = Callable[[int, int], None]


def is_uri(text: str) -> bool:
    """Whether a text is a URI `scheme://…`, and not a path or a name such as hub:NAME or embedded:NAME."""
    return _URI.match(text) is not None


def in_place(uri: str) -> Path | None:
    """The path of a file:// URI; None for other URIs."""
    return Path(uri[len(_FILE) :]).absolute() if uri.lower().startswith(_FILE) else None


@dataclass(frozen=True)
class Entry:
    """A file in a store. size: bytes. version: a text that changes when the file is replaced."""

    size: int
    version: str


class Remote:
    """A file or folder at a URI. option: the option with the URI, for messages.

    Names of files are paths relative to the parent folder, with slashes: `llama/config.json` of s3://bucket/llama.
    Every method raises UserError, in one line, for errors of the store.
    """

    def __init__(self, uri: str, option: str) -> None:
        self.uri = uri
        self.option = option
        self.name = uri.rstrip("/").rpartition("/")[2]

    @cached_property
    def _place(self) -> tuple[Any, str, str]:
        """The fsspec file system, the path on it, and the path's parent folder with a slash at its end."""
        import fsspec

        # gcsfs logs tracebacks of errors that it retries; final errors are raised in any case.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        with self.refusals():
            system, path = fsspec.url_to_fs(self.uri, use_listings_cache=False)
        path = path.rstrip("/")
        if not self.name or path.rpartition("/")[2] != self.name:
            raise UserError(f"{self.option}={self.uri} names no file or folder: give SCHEME://BUCKET/NAME")
        return system, path, path[: -len(self.name)]

    def files(self, *beside: str) -> dict[str, Entry]:
        """All files; empty if there are none. beside: endings of further files, `.meta.json` for URI.meta.json."""
        system, path, above = self._place
        with self.refusals():
            listed = self._listed(path)
            for ending in beside:
                listed |= self._listed(path + ending) if system.isfile(path + ending) else {}
        files = {name.removeprefix(above): _entry(info) for name, info in sorted(listed.items())}
        unsafe = next((name for name in files if {"", ".", ".."} & set(name.split("/"))), None)
        if unsafe is not None:
            raise UserError(f"{self.option}={self.uri} contains a file with the unsafe name {unsafe!r}: rename it")
        return files

    def _listed(self, path: str) -> dict[str, dict[str, Any]]:
        """The store's information about a file, or about all files of a folder, by path."""
        system, _, _ = self._place
        system.invalidate_cache()
        try:
            listing = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
        # Some stores list markers of folders, whose names end with a slash; some list a single file without details.
        described = {name: info or system.info(name) for name, info in listing.items() if not name.endswith("/")}
        return {name: info for name, info in described.items() if info["type"] == "file"}

    def get(self, name: str, path: Path) -> None:
        """Download a file to a local path; it is renamed into place when it is complete."""
        system, _, above = self._place
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part")
        try:
            with self.refusals():
                system.get_file(above + name, str(temporary))
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def put(self, path: Path, name: str) -> None:
        """Upload a local file; stores show it only when it is complete."""
        system, _, above = self._place
        with self.refusals("written"):
            system.put_file(str(path), above + name)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        system, _, above = self._place
        with self.refusals("written"), suppress(FileNotFoundError):
            system.rm_file(above + name)

    def check_writable(self) -> None:
        """UserError if files cannot be uploaded and removed."""
        system, path, _ = self._place
        with self.refusals("written"):
            system.pipe_file(f"{path}.check", b"hasten checks that it may write here\n")
            system.rm_file(f"{path}.check")

    @contextmanager
    def refusals(self, what: str = "read") -> Iterator[None]:
        """Context that turns errors of the store's client, which have no common base class, into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(self._refusal(error, what)) from error

    def _refusal(self, error: Exception, what: str) -> str:
        named = f"{self.option}={self.uri}"
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        scheme = self.uri.partition("://")[0].lower()
        if is_disk_full(error):
            return f"the disk is full while copying {named}: make space and run the same command again"
        if isinstance(error, ImportError):
            package = _PACKAGES.get(scheme)
            remedy = f"pip install 'hasten[cloud]', which brings {package}" if package else "install that package"
            return f"{named} needs a package that is not installed ({reason}): {remedy}"
        if isinstance(error, ValueError) and "Protocol not known" in reason:
            return f"{named} has an unknown scheme: give file://, s3://, gs:// or another one that fsspec knows"
        if isinstance(error, FileNotFoundError):
            return f"{named} does not exist: check bucket and name"
        if isinstance(error, PermissionError) or "credentials" in f"{type(error).__name__} {reason}".lower():
            return f"{named} cannot be {what} ({reason}): check the credentials; {_CREDENTIALS}"
        return f"{named} cannot be {what} ({type(error).__name__}: {reason})"


def localized(uri: str, cache: Path, option: str = "model", progress: Progress | None = None) -> Path:
    """Absolute path of a local copy of the file or folder at a URI; for file:// the path itself.

    cache: folder for copies; an existing copy is used. progress(bytes copied, all bytes) is called after each file.
    UserError if there is nothing at the URI, it cannot be read, or it changes meanwhile.
    """
    path = in_place(uri)
    if path is not None:
        return path
    remote = Remote(uri, option)
    files = _needed(remote.files())
    if not files:
        raise UserError(f"{option}={uri} does not exist: there is no file, and no folder with files in it")
    folder = cache.expanduser().absolute() / "inputs" / _key(uri, files)
    with writable(cache, option, uri):
        folder.mkdir(parents=True, exist_ok=True)
    # A second process that needs the same copy waits here, and then finds it complete.
    with locked(folder.with_suffix(".lock")):
        missing = {name: entry for name, entry in files.items() if not _is_there(folder / name, entry)}
        if missing:
            check_space(folder, missing, f"{option}={uri}")
            _LOG.info("copying %s to %s", uri, folder / remote.name)
            get_all(remote, folder, files, missing, progress)
            if _needed(remote.files()) != files:
                shutil.rmtree(folder)
                raise UserError(f"{option}={uri} changed while it was copied: run the same command again")
    return folder / remote.name


def get_all(
    remote: Remote,
    folder: Path,
    files: Mapping[str, Entry],
    missing: Mapping[str, Entry],
    progress: Progress | None = None,
    then: Callable[[str], None] | None = None,
) -> None:
    """Copy the missing files into a folder, a few at a time; then(name) is called after each.

    files: all files, for the total of progress(bytes copied, all bytes).
    """
    total = sum(entry.size for entry in files.values())
    done = total - sum(entry.size for entry in missing.values())
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="storage") as pool:
        copies = [(name, pool.submit(remote.get, name, folder / name)) for name in missing]
        try:
            for name, copy in copies:
                copy.result()
                if (folder / name).stat().st_size != missing[name].size:
                    (folder / name).unlink()
                    raise UserError(
                        f"{remote.option}={remote.uri} changed while it was copied: run the same command again"
                    )
                if then is not None:
                    then(name)
                done += missing[name].size
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)


def check_space(folder: Path, missing: Mapping[str, Entry], what: str) -> None:
    """UserError if the disk of a folder has no room for the missing files."""
    needed = sum(entry.size for entry in missing.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} takes {needed / 2**30:.1f} GiB, and the disk of {folder} has {free / 2**30:.1f} GiB left: make "
            "space, or set cache=FOLDER on a larger disk"
        )


@contextmanager
def writable(cache: Path, option: str, uri: str) -> Iterator[None]:
    """Context that turns an OSError, because the folder for copies cannot be created, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache={cache} cannot be written to ({error.strerror}), which {option}={uri} needs for a copy: give "
            "cache=FOLDER"
        ) from None


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Context with an exclusive lock on a file; a second process waits, or raises UserError(busy) if that is given.

    On a file system without locks, it does not exclude other processes.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy is not None:
                raise UserError(busy) from None
            _LOG.info("waiting for another process that copies the same files")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def _entry(info: Mapping[str, Any]) -> Entry:
    version = next((info[key] for key in (*_VERSIONS, *_TIMES) if info.get(key) is not None), "")
    return Entry(int(info["size"] or 0), str(version))


def _needed(files: Mapping[str, Entry]) -> dict[str, Entry]:
    """The files without duplicates in other formats, if there are safetensors files."""
    if not any(name.endswith(".safetensors") for name in files):
        return dict(files)
    below = {name: name.partition("/")[2] for name in files}
    return {name: entry for name, entry in files.items() if not below[name].startswith(_DUPLICATES)}


def _is_there(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size


def _key(uri: str, files: Mapping[str, Entry]) -> str:
    described = [uri, [[name, entry.size, entry.version] for name, entry in files.items()]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
