"""The one thread of a process that writes to a tracking store, and what all runs have as tags.

Several processes may have one sqlite file: each of their calls holds a lock beside it, so that none ever finds the
database locked. Where `hasten ui` serves the file, they write through its server.
"""

import contextlib
import logging
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
from filelock import FileLock

from hasten.accel.errors import UserError
from hasten.cluster.runtime import resources
from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOG = logging.getLogger(__name__)
T = TypeVar("T")
_TAG_CHARACTERS = 5000
_RUNS_AT_ONCE = 100
_NICE = 10


class Writer:
    """Makes calls to MLflow in order, in a thread of its own: nobody waits for the database or the server.

    uri: any MLflow tracking URI; None is a sqlite file in `runs` of the current folder. A store that cannot be
    reached is a UserError of `open`; one that is lost later costs what is written from then on, and a warning.
    """

    def __init__(self, uri: str | None, experiment: str) -> None:
        self.uri = store.absolute(uri) if uri else store.default_uri()
        self.experiment = experiment
        self.lost = self._is_served = False
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking", initializer=_give_way)
        self._opened: Future[None] | None = None

    def open(self) -> None:
        """Connect; a new sqlite file gets its tables in the thread, which takes seconds."""
        store.check_reachable(self.uri)
        store.import_mlflow()
        # A new sqlite file cannot be wrong, so the job goes on meanwhile.
        waits = not store.is_new(self.uri)
        self._opened = self._thread.submit(self._connect)
        if waits:
            try:
                self._opened.result()
            except Exception as error:  # MLflow's, the database's or the network's
                self._thread.shutdown()
                raise UserError(f"tracking.uri={self.uri} cannot be used: {store.first_line(error)}") from error

    def close(self) -> None:
        """Return when all is written."""
        self._thread.shutdown()

    def submit(self, function: Callable[..., T], *arguments: object, **named: object) -> Future[T | None]:
        """Call function(client, experiment id, …) when those before are done; None where the store is lost."""
        return self._thread.submit(lambda: self._call(function, *arguments, **named))

    def _call(self, function: Callable[..., T], *arguments: object, **named: object) -> T | None:
        if self._opened is None:
            raise ValueError("a Writer writes only once it is open")
        try:
            self._opened.result()
            if self.lost:
                return None
            try:
                return self._made(function, *arguments, **named)
            except Exception:
                if not self._is_served or store.serving(self.uri):
                    raise
                # `hasten ui` was ended: the file itself is there.
                from mlflow import MlflowClient

                self._is_served, self._client = False, MlflowClient(tracking_uri=self.uri)
                return self._made(function, *arguments, **named)
        except Exception as error:  # a job of hours must not end with the tracking server
            if getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
                LOG.warning("MLflow refuses what a run tells: %s", store.first_line(error))
            elif not self.lost:
                self.lost = True
                LOG.warning("nothing more is tracked at %s: %s", self.uri, store.first_line(error))
                LOG.debug("the call that failed", exc_info=error)
            return None

    def _made(self, function: Callable[..., T], *arguments: object, **named: object) -> T:
        with self._turn():
            return function(self._client, self._experiment_id, *arguments, **named)

    def _connect(self) -> None:
        from mlflow import MlflowClient

        file = store.sqlite_file(self.uri)
        if file is not None:
            store.make_database(file)
        server = store.serving(self.uri)
        self._is_served = server is not None
        client = MlflowClient(tracking_uri=server or self.uri)
        with self._turn():
            experiment = self._found_experiment(client)
            _close_dead_runs(client, experiment)
        self._client, self._experiment_id = client, experiment

    def _turn(self) -> contextlib.AbstractContextManager[object]:
        file = store.sqlite_file(self.uri)
        return contextlib.nullcontext() if file is None else FileLock(f"{file}.lock")

    def _found_experiment(self, client: "MlflowClient") -> str:
        """Id of the experiment, made where it is missing."""
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(self.experiment, artifact_location=store.artifact_location(self.uri)))
        except Exception:
            # Another run may have made it meanwhile.
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                raise
            return str(found.experiment_id)


def run_tags(run_dir: Path, parent: str | None = None) -> dict[str, str]:
    """Tags of a run: folder, code version, process, machine, and the run that it is nested in."""
    machine = resources.machine()
    commit = resources.git_commit()
    tags = {
        "hasten.run_dir": as_given(str(run_dir.absolute())),
        "hasten.version": commit or resources.package_version(),
        "hasten.process": f"{os.getpid()} {psutil.Process().create_time():.2f}",
        **{f"machine.{name}": value if isinstance(value, str) else str(value) for name, value in machine.items()},
    }
    if commit:
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    if parent:
        tags["mlflow.parentRunId"] = parent
    return {name: value[:_TAG_CHARACTERS] for name, value in tags.items()}


def status(error: BaseException | None) -> str:
    """MLflow's status of a run that ended with this error."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def _give_way() -> None:
    """Tracking takes what processors the work leaves; on Linux a thread has a niceness of its own."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _close_dead_runs(client: "MlflowClient", experiment: str) -> None:
    """Marks runs KILLED that SIGKILL or a power cut left as running on this machine."""
    here = platform.node()
    query = f"attributes.status = 'RUNNING' and tags.`machine.host` = '{here}'"
    for run in client.search_runs([experiment], query, max_results=_RUNS_AT_ONCE):
        process = run.data.tags.get("hasten.process", "")
        if process and not _alive(process):
            client.set_terminated(run.info.run_id, status="KILLED")


def _alive(process: str) -> bool:
    """Whether the process of a `hasten.process` tag still runs: its id, and its start, for ids are used again."""
    number, started = process.split()
    with contextlib.suppress(psutil.Error):
        return abs(psutil.Process(int(number)).create_time() - float(started)) < 1
    return False
