"""One MLflow run for one job, and the job's report.json.

Only the driver writes to MLflow. A tracking store that cannot be reached is an error at the start; one that is lost
later costs the figures from then on, not the job: report.json holds them all.
"""

import contextlib
import json
import logging
import math
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accel.errors import UserError
from cluster import resources, store

LOG = logging.getLogger(__name__)
# MLflow's own limits; the first three are of one call.
_PARAMS_AT_ONCE = 100
_METRICS_AT_ONCE = 1000
_TAG_CHARACTERS = 5000
_KEY_CHARACTERS = 250
_VALUE_CHARACTERS = 6000
_RUNS_AT_ONCE = 100


def write_report(run_dir: Path, report: Mapping[str, Any]) -> Path:
    """Path of run_dir/report.json, written whole or not at all.

    Numbers that JSON does not have (nan, infinities) become null; other objects become their text.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "report.json"
    unfinished = run_dir / f".report.json.{os.getpid()}"
    text = json.dumps(_plain(report), indent=2, allow_nan=False, ensure_ascii=False)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


class Tracker:
    """Context of one MLflow run: finished when left normally, FAILED after an error, KILLED after a signal.

    uri: any MLflow tracking URI; None is a sqlite file in `runs` of the current folder. Artifacts of a sqlite store
    lie beside its file. parent: id of the run that this one is nested in.
    Entering raises UserError where the store cannot be reached.
    """

    def __init__(self, uri: str | None, experiment: str, run_name: str, run_dir: Path, parent: str | None = None):
        self.uri = store.absolute(uri) if uri else store.default_uri()
        self.experiment = experiment
        self.run_name = run_name
        self.run_dir = Path(run_dir)
        self.parent = parent
        self._client: Any = None
        self._run_id = ""
        self._lost = False
        self._previous_handler: Any = None
        # One thread makes every call, in order: the job does not wait for the database or the server.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self._started: Future[None] | None = None

    def __enter__(self) -> Self:
        store.check_reachable(self.uri)
        store.import_mlflow()
        # A new sqlite file takes seconds to get its tables; it cannot be wrong, so the job goes on meanwhile.
        waits = not store.is_new(self.uri)
        self._started = self._thread.submit(self._start)
        if waits:
            try:
                self._started.result()
            except Exception as error:  # MLflow's, the database's or the network's
                self._thread.shutdown()
                raise UserError(f"tracking.uri={self.uri} cannot be used: {store.first_line(error)}") from error
        self._catch_termination()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
        self._submit("set_terminated", status=_status(error))
        self._thread.shutdown()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty where its store was lost."""
        self._wait()
        return self._run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested ones get their path with dots as name, long ones are cut to MLflow's limits."""
        from mlflow.entities import Param

        entries = [Param(_key(name), _text(value)[:_VALUE_CHARACTERS]) for name, value in _flat(values)]
        for begin in range(0, len(entries), _PARAMS_AT_ONCE):
            self._submit("log_batch", params=entries[begin : begin + _PARAMS_AT_ONCE])

    def metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Log numbers of one step in one call; what is None or no number is left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = [(name, _number(value)) for name, value in _flat(values)]
        entries = [Metric(_key(name), number, now, step) for name, number in numbers if number is not None]
        for begin in range(0, len(entries), _METRICS_AT_ONCE):
            self._submit("log_batch", metrics=entries[begin : begin + _METRICS_AT_ONCE])

    def figure(self, path: Path) -> None:
        """Log an image under figures/."""
        self.artifact(path, "figures")

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log any file of the run, such as the resolved config."""
        self._submit("log_artifact", str(path), folder)

    def report(self, report: Mapping[str, Any]) -> Path:
        """Path of report.json, after writing it and logging it and the figures under its `metrics`."""
        path = write_report(self.run_dir, report)
        self.metrics(report.get("metrics", {}))
        self.artifact(path)
        return path

    def _start(self) -> None:
        from mlflow import MlflowClient

        file = store.sqlite_file(self.uri)
        if file is not None:
            store.make_database(file)
        client = MlflowClient(tracking_uri=self.uri)
        experiment = self._experiment(client)
        _close_dead_runs(client, experiment)
        run = client.create_run(experiment, run_name=self.run_name, tags=_tags(self.run_dir, self.parent))
        self._client, self._run_id = client, run.info.run_id

    def _experiment(self, client: Any) -> str:
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

    def _submit(self, function: str, *arguments: Any, **named: Any) -> None:
        if self._started is None:
            raise ValueError("a Tracker logs only inside its `with` block")
        self._thread.submit(self._call, function, *arguments, **named)

    def _call(self, function: str, *arguments: Any, **named: Any) -> None:
        """One call to MLflow, in the tracker's thread; after one that failed, none."""
        self._wait()
        if self._lost:
            return
        try:
            getattr(self._client, function)(self._run_id, *arguments, **named)
        except Exception as error:  # a job of hours must not end with the tracking server
            self._lose(error)

    def _wait(self) -> None:
        """Until the run was made."""
        if self._started is None:
            raise ValueError("a Tracker has a run only inside its `with` block")
        error = self._started.exception()
        if error is not None and not self._lost:
            self._lose(error)

    def _lose(self, error: BaseException) -> None:
        self._lost = True
        LOG.warning("nothing more is tracked at %s: %s", self.uri, store.first_line(error))

    def _catch_termination(self) -> None:
        """SIGTERM's default ends the process before the run could be marked: make it an exception."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._previous_handler = signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def _tags(run_dir: Path, parent: str | None) -> dict[str, str]:
    import psutil

    machine = resources.machine()
    commit = resources.git_commit()
    tags = {
        "hasten.run_dir": str(run_dir.resolve()),
        "hasten.version": commit or resources.package_version(),
        "hasten.process": f"{os.getpid()} {psutil.Process().create_time():.2f}",
        **{f"machine.{name}": _text(value) for name, value in machine.items()},
    }
    if commit:
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    if parent:
        tags["mlflow.parentRunId"] = parent
    return {name: value[:_TAG_CHARACTERS] for name, value in tags.items()}


def _close_dead_runs(client: Any, experiment: str) -> None:
    """Marks runs KILLED that SIGKILL or a power cut left as running on this machine."""
    here = platform.node()
    query = f"attributes.status = 'RUNNING' and tags.`machine.host` = '{here}'"
    for run in client.search_runs([experiment], query, max_results=_RUNS_AT_ONCE):
        process = run.data.tags.get("hasten.process", "")
        if process and not _alive(process):
            client.set_terminated(run.info.run_id, status="KILLED")


def _alive(process: str) -> bool:
    """Whether the process of a `hasten.process` tag still runs: its id, and its start, for ids are used again."""
    import psutil

    number, started = process.split()
    with contextlib.suppress(psutil.Error):
        return abs(psutil.Process(int(number)).create_time() - float(started)) < 1
    return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings under their dotted path; lists are leaves."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _key(name: str) -> str:
    """Name in the characters that MLflow allows, cut to its limit."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:_KEY_CHARACTERS]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """What JSON can hold: mappings, lists, strings, finite numbers, booleans and null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    number = _number(value)
    return str(value) if number is None else _plain(value.item())


def _number(value: Any) -> float | None:
    """A number of Python, numpy or torch as a float; None for anything else."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, int | float) else None
