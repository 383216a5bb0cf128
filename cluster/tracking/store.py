"""Tracking stores of MLflow: a sqlite file, which is created atomically, or any other tracking URI."""

import http.client
import json
import logging
import os
import platform
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from hasten.accel.errors import UserError

CONNECT_SECONDS = 5.0


def default_uri(folder: Path | None = None) -> str:
    """Absolute URI of the sqlite file mlflow.db in a folder; None is the folder `runs` in the current one."""
    return _sqlite((folder or Path("runs")) / "mlflow.db")


def import_mlflow() -> None:
    """Import MLflow, with short timeouts, and without telemetry and its log messages."""
    # MLflow reads these variables at its import. With them, the loss of a server is noticed in about a minute, instead
    # of a quarter of an hour.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # Here, in the caller's thread, because importing a package in two threads at once can fail.
    import mlflow  # noqa: F401

    # After the import, which sets the level to INFO, with a message for every table that is created.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def sqlite_file(uri: str) -> Path | None:
    """File of a sqlite URI; None for any other store."""
    if not uri.startswith("sqlite:///") or ":memory:" in uri:
        return None
    return Path(uri.removeprefix("sqlite:///"))


def is_new(uri: str) -> bool:
    """Whether the store is a sqlite file that does not exist yet. Creates its folder; UserError if that fails."""
    file = sqlite_file(uri)
    if file is None:
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return not file.exists()
    except OSError as error:
        raise UserError(f"tracking.uri={uri} cannot be created ({first_line(error)}): give another path") from error


def absolute(uri: str) -> str:
    """The URI with the absolute path of a sqlite file, because actors have other working folders."""
    file = sqlite_file(uri)
    return uri if file is None else _sqlite(file)


def _sqlite(file: Path) -> str:
    return f"sqlite:///{file.expanduser().resolve().as_posix()}"


def server_file(file: Path) -> Path:
    """File in which `hasten ui` notes its server for this sqlite file: JSON with `url`, `host` and `process`."""
    return file.with_name(f"{file.name}.server")


def serving(uri: str) -> str | None:
    """URL of the server that `hasten ui` runs on this machine for the store's sqlite file; None if there is none."""
    file = sqlite_file(uri)
    if file is None:
        return None
    try:
        note = json.loads(server_file(file).read_text(encoding="utf-8"))
        # The note may be of a killed server, or, on a network folder, of a server on another machine.
        if note["host"] != platform.node() or not psutil.pid_exists(int(note["process"])):
            return None
        check_reachable(note["url"])
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return str(note["url"])


def artifact_location(uri: str) -> str | None:
    """URI of the folder for artifacts beside a sqlite file; None for other stores, which have their own."""
    file = sqlite_file(uri)
    return None if file is None else (file.parent / "mlartifacts").as_uri()


def check_reachable(uri: str) -> None:
    """UserError, within seconds, if nothing answers at an http URI."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(uri, timeout=CONNECT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # something answers; MLflow itself checks whether it is an MLflow server
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # MLflow may be configured to trust the certificate
        raise UserError(
            f"tracking.uri={uri} cannot be reached ({reason}); start the server, or leave tracking.uri out for a "
            "local sqlite file"
        ) from error


def make_database(file: Path) -> None:
    """Create a sqlite file with MLflow's tables, unless it exists.

    The tables are created in dozens of steps, which take seconds. A run that is killed in between would leave a file
    that MLflow cannot open, so the file is created under a temporary name.
    """
    from mlflow import MlflowClient

    if file.exists():
        return
    for left_over in file.parent.glob(f".{file.name}.*"):
        # Temporary files end with the process id; those of sqlite's journal with -journal after it.
        number = left_over.suffix[1:].partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            left_over.unlink(missing_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    try:
        MlflowClient(tracking_uri=_sqlite(unfinished))
        _put(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _put(unfinished: Path, file: Path) -> None:
    # Unlike a rename, a link does not replace a file that another run has created meanwhile.
    try:
        os.link(unfinished, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        unfinished.replace(file)


def first_line(error: BaseException) -> str:
    """First line of an error's text; its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
