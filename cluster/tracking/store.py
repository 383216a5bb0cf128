"""Where MLflow keeps its runs: a sqlite file, made whole or not at all, or any other tracking URI."""

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
    """URI of the sqlite file mlflow.db in a folder, absolute; None takes `runs` in the current one."""
    return _sqlite((folder or Path("runs")) / "mlflow.db")


def import_mlflow() -> None:
    """Imports MLflow with short timeouts and without its chatter."""
    # Read at the import: nothing is sent anywhere that was not asked for, and a server that goes away while the job
    # runs is noticed in about a minute, not in MLflow's quarter of an hour.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # In the caller's thread: imports of one package in two threads can meet halfway.
    import mlflow  # noqa: F401

    # After the import, which sets them to INFO: a line for every table that is made.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def sqlite_file(uri: str) -> Path | None:
    """File of a sqlite URI; None for any other store."""
    if not uri.startswith("sqlite:///") or ":memory:" in uri:
        return None
    return Path(uri.removeprefix("sqlite:///"))


def is_new(uri: str) -> bool:
    """Whether the store is a sqlite file still to be made; its folder is made here, or UserError raised."""
    file = sqlite_file(uri)
    if file is None:
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return not file.exists()
    except OSError as error:
        raise UserError(f"tracking.uri={uri} cannot be made: {first_line(error)}") from error


def absolute(uri: str) -> str:
    """The URI, a sqlite file's path made absolute: actors have other working folders."""
    file = sqlite_file(uri)
    return uri if file is None else _sqlite(file)


def _sqlite(file: Path) -> str:
    return f"sqlite:///{file.expanduser().resolve().as_posix()}"


def server_file(file: Path) -> Path:
    """Where `hasten ui` says that its server writes this sqlite file: JSON of `url`, `host` and `process`."""
    return file.with_name(f"{file.name}.server")


def serving(uri: str) -> str | None:
    """URL of the server that `hasten ui` runs for this sqlite file on this machine; None where there is none."""
    file = sqlite_file(uri)
    if file is None:
        return None
    try:
        found = json.loads(server_file(file).read_text(encoding="utf-8"))
        # A server that was killed leaves its note; on a network folder another machine's is not this one's.
        if found["host"] != platform.node() or not psutil.pid_exists(int(found["process"])):
            return None
        check_reachable(found["url"])
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return str(found["url"])


def artifact_location(uri: str) -> str | None:
    """Folder for artifacts beside a sqlite file; None leaves it to the store."""
    file = sqlite_file(uri)
    return None if file is None else (file.parent / "mlartifacts").as_uri()


def check_reachable(uri: str) -> None:
    """Raises UserError, in seconds, where nothing answers at an http URI."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(uri, timeout=CONNECT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers; whether it is an MLflow server, MLflow will tell
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # MLflow may have been told to trust it
        raise UserError(
            f"tracking.uri={uri} cannot be reached ({reason}); start the server, or leave tracking.uri out for a "
            "local sqlite file"
        ) from error


def make_database(file: Path) -> None:
    """Makes a sqlite file with MLflow's tables, unless there is one.

    The tables are made in dozens of steps, which take seconds: a run killed in between would leave a file that MLflow
    never opens again. So they are made under another name.
    """
    from mlflow import MlflowClient

    if file.exists():
        return
    for left_over in file.parent.glob(f".{file.name}.*"):
        # Named by the process, and sqlite's journal with -journal behind it.
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
    # Unlike a rename, a link does not replace the file that another run may have made meanwhile.
    try:
        os.link(unfinished, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        unfinished.replace(file)


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
