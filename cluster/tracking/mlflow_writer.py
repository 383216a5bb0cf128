"""The thread of a process that writes to the tracking store, and the tags of all runs.

Several processes may use one sqlite file: each call holds a lock file beside it, so that sqlite never reports a locked
database. While `hasten ui` serves the file, they write through its server.
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
TAG_CHARACTERS = 5000
_RUNS_AT_ONCE = 100
_NICE = 10


class Writer:
    """Makes calls to MLflow in order, in a separate thread, so that callers do not wait for the database or server.

    uri: any MLflow tracking URI; None is a sqlite file in the folder `runs`. `open` raises UserError if the store
    cannot be reached. If the store is lost later, there is one warning, and later calls are dropped.
    """

    def __init__(self, uri: str | None, experiment: str) -> None:
        self.uri = store.absolute(uri) if uri else store.default_uri()
        self.experiment = experiment
        self.lost = self._is_served = False
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking", initializer=_lower_priority)
        self._opened: Future[None] | None = None

    def open(self) -> None:
        """Connect to the store; UserError if that fails."""
        store.check_reachable(self.uri)
        store.import_mlflow()
        # A new sqlite file gets its tables in the thread, which takes seconds. The job need not wait for that, because
        # a new file has no errors to report.
        exists = not store.is_new(self.uri)
        self._opened = self._thread.submit(self._connect)
        if exists:
            try:
                self._opened.result()
            except Exception as error:  # of MLflow, the database or the network
                self._thread.shutdown()
                raise UserError(f"tracking.uri={self.uri} cannot be used: {store.first_line(error)}") from error

    def close(self) -> None:
        """Wait until all calls are done, and end the thread."""
        self._thread.shutdown()

    def submit(self, function: Callable[..., T], *arguments: object, **named: object) -> Future[T | None]:
        """Call function(client, experiment id, …) after all earlier calls; the result is None if the store is lost."""
        return self._thread.submit(lambda: self._call(function, *arguments, **named))

    def _call(self, function: Callable[..., T], *arguments: object, **named: object) -> T | None:
        if self._opened is None:
            raise ValueError("a Writer writes only once it is open")
        try:
            self._opened.result()
            if self.lost:
                return None
            try:
                return self._call_locked(function, *arguments, **named)
            except Exception:
                if not self._is_served or store.serving(self.uri):
                    raise
                # `hasten ui` has ended: write to the sqlite file directly.
                from mlflow import MlflowClient

                self._is_served, self._client = False, MlflowClient(tracking_uri=self.uri)
                return self._call_locked(function, *arguments, **named)
        except Exception as error:  # the loss of the tracking server must not end a job
            if getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
                LOG.warning("MLflow rejected a value of the run: %s", store.first_line(error))
            elif not self.lost:
                self.lost = True
                LOG.warning(
                    "nothing more is tracked at %s (report.json still gets all results): %s",
                    self.uri,
                    store.first_line(error),
                )
                LOG.debug("the call that failed", exc_info=error)
            return None

    def _call_locked(self, function: Callable[..., T], *arguments: object, **named: object) -> T:
        with self._lock():
            return function(self._client, self._experiment_id, *arguments, **named)

    def _connect(self) -> None:
        from mlflow import MlflowClient

        file = store.sqlite_file(self.uri)
        if file is not None:
            store.make_database(file)
        server = store.serving(self.uri)
        self._is_served = server is not None
        client = MlflowClient(tracking_uri=server or self.uri)
        with self._lock():
            experiment = self._experiment_of(client)
            _close_dead_runs(client, experiment)
        self._client, self._experiment_id = client, experiment

    def _lock(self) -> contextlib.AbstractContextManager[object]:
        """The lock of the store's sqlite file; no lock for other stores."""
        file = store.sqlite_file(self.uri)
        return contextlib.nullcontext() if file is None else FileLock(f"{file}.lock")

    def _experiment_of(self, client: "MlflowClient") -> str:
        """Id of the experiment, which is created if it is missing."""
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        try:
            return str(client.create_experiment(self.experiment, artifact_location=store.artifact_location(self.uri)))
        except Exception:
            # Another run may have created it meanwhile.
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                raise
            return str(experiment.experiment_id)


def run_tags(run_dir: Path, parent: str | None = None) -> dict[str, str]:
    """Tags of a run: folder, code version, process, machine, and the id of its parent run."""
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
    return {name: value[:TAG_CHARACTERS] for name, value in tags.items()}


def status(error: BaseException | None) -> str:
    """MLflow's status of a run that ended with this error."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def _lower_priority() -> None:
    """Lower the tracking thread's priority below the job's; on Linux each thread has its own niceness."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _close_dead_runs(client: "MlflowClient", experiment: str) -> None:
    """Mark runs of this machine KILLED that are still RUNNING in the store, but whose process has ended."""
    here = platform.node()
    query = f"attributes.status = 'RUNNING' and tags.`machine.host` = '{here}'"
    for run in client.search_runs([experiment], query, max_results=_RUNS_AT_ONCE):
        process = run.data.tags.get("hasten.process", "")
        if process and not _alive(process):
            client.set_terminated(run.info.run_id, status="KILLED")


def _alive(process: str) -> bool:
    """Whether the process of a `hasten.process` tag still runs. Its start time is compared, too, as ids are reused."""
    number, started = process.split()
    with contextlib.suppress(psutil.Error):
        return abs(psutil.Process(int(number)).create_time() - float(started)) < 1
    return False
