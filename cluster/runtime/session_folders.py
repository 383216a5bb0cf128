"""Folders of a Ray session: a short path for its sockets, and an empty current folder for its processes.

A Unix socket's path is limited to 107 bytes, of which Ray needs more than half. With a longer TMPDIR, Ray gets the path
of a link in a folder such as /tmp; the files themselves stay in TMPDIR.

Ray puts the driver's current folder first on the import path of all its workers, so that a `torch.py` of the user's
there would be imported in place of the package. While the session starts, the current folder is an empty one.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasten.accel.errors import UserError
from hasten.import_path import ROOT

# Below a session's folder, Ray's longest socket is /session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store.
_SOCKET_BYTES = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_VARIABLES = ("RAY_TMPDIR", "TMPDIR")
_RIGHT = "set it to a folder that can be written to, or unset it"


def check_folders() -> None:
    """UserError if this user has no home folder, or no usable one for temporary files, or no current folder."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder cannot be read ({error.strerror}): change to one that exists") from None
    if os.path.expanduser("~") == "~":
        raise UserError("this user has no home folder, which Ray and caches need: set HOME to a folder")
    for name in _VARIABLES:
        folder = os.environ.get(name)
        if folder and not os.path.isdir(folder):
            raise UserError(f"{name}={folder} is no folder: {_RIGHT}")
        if folder and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{name}={folder} cannot be written to: {_RIGHT}")
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"there is no folder for temporary files ({error.strerror}): set TMPDIR to one") from None


@contextmanager
def ray_folder() -> Iterator[str | None]:
    """Context with a folder for Ray's session whose path is short enough for sockets; None is Ray's default.

    UserError if the default is too long and no folder for a link to it can be written to.
    """
    name = next((name for name in _VARIABLES if os.environ.get(name)), None)
    folder = os.path.abspath(os.environ[name]) if name else "/tmp"
    if name is None:
        # Ray takes an empty text for a path.
        for variable in _VARIABLES:
            os.environ.pop(variable, None)
    if len(os.fsencode(f"{folder}/ray")) <= _SOCKET_BYTES:
        yield None if name is None else f"{folder}/ray"
        return
    parent = short_folder()
    if parent is None:
        raise UserError(
            f"{name}={folder} is too long for the sockets of Ray, which need a folder of at most "
            f"{_SOCKET_BYTES - len('/ray')} bytes: set RAY_TMPDIR to a shorter one"
        )
    target = Path(folder, "ray")
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hasten-", dir=parent, ignore_cleanup_errors=True) as short:
        link = Path(short, "ray")
        link.symlink_to(target)
        try:
            yield str(link)
        finally:
            link.unlink(missing_ok=True)


def short_folder() -> str | None:
    """A folder that can be written to, and whose path is short enough for sockets below it; None without any."""
    folders = ("/tmp", os.environ.get("XDG_RUNTIME_DIR"), "/var/tmp", "/dev/shm")
    longest = _SOCKET_BYTES - len("/hasten-00000000/ray")
    for folder in folders:
        if folder and os.access(folder, os.W_OK | os.X_OK) and len(os.fsencode(folder)) <= longest:
            return folder
    return None


@contextmanager
def empty_folder() -> Iterator[str]:
    """Context with a new, empty folder, which is removed when the context ends."""
    with tempfile.TemporaryDirectory(prefix="hasten-", ignore_cleanup_errors=True) as folder:
        yield folder


@contextmanager
def current_folder(folder: str) -> Iterator[None]:
    """Context with another current folder, except in a checkout of hasten, from which the workers import it."""
    before = os.open(".", os.O_RDONLY)
    try:
        if os.getcwd() != ROOT:
            os.chdir(folder)
        yield
    finally:
        os.fchdir(before)
        os.close(before)
