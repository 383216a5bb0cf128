"""Tracking of one job as one run, and the job's report.json.

Only the driver writes to MLflow. It is an error if the tracking store cannot be reached at the start. If the store is
lost later, the job continues without tracking, and report.json has all results. In a point of a sweep, the same calls
write to the point's journal, which the sweep's driver writes to MLflow.
"""

import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from hasten.cluster.storage.naming import as_given
from hasten.cluster.tracking import events, journal
from hasten.cluster.tracking.environment import write_environment
from hasten.cluster.tracking.mlflow_writer import TAG_CHARACTERS, Writer, run_tags, status
from hasten.cluster.tracking.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own limits.
_KEY_CHARACTERS = 250
_VALUE_CHARACTERS = 6000
# Artifacts of every run, logged at its start and, for the log, at its end.
_FIRST, _LAST = ("config.yaml",), ("hasten.log",)


def write_report(run_dir: Path, report: Mapping[str, Any]) -> Path:
    """Write run_dir/report.json atomically; returns its path.

    Numbers that JSON does not have (nan, infinities) become null; other objects become strings.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "report.json"
    unfinished = run_dir / f".report.json.{os.getpid()}"
    text = json.dumps(_plain(as_given(report)), indent=2, allow_nan=False, ensure_ascii=False)
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
    """Context of one tracked run, which ends as FINISHED, as FAILED after an error, or as KILLED after a signal.

    Entering raises UserError if the store cannot be reached. uri: any MLflow tracking URI; None is a sqlite file in the
    folder `runs`. Artifacts of a sqlite store are in a folder beside its file. system_seconds: interval of samples of
    the machine's load; 0 takes none. register: name of the registered model that gets the run's output as its next
    version; None registers nothing. tags_of: tags of a report, and of an empty mapping at the start of the run.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_name: str,
        run_dir: Path,
        system_seconds: float = 0,
        register: str | None = None,
        tags_of: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None,
    ) -> None:
        self.run_name = run_name
        self.run_dir = Path(run_dir)
        self._system_seconds, self._register, self._tags_of = system_seconds, register, tags_of
        self._journal = journal.current()
        self._writer = Writer(uri, experiment)
        self._run: Future[str | None] | None = None
        self._system: SystemMetrics | None = None
        self._previous_handler: Callable[[int, FrameType | None], object] | int | None = None

    def __enter__(self) -> Self:
        if self._journal is None:
            self._writer.open()
            self._run = self._writer.submit(_create, self.run_name, self.run_dir)
        self._log_tags({})
        write_environment(self.run_dir, self.uri)
        for name in ("environment.json", *_FIRST):
            self._log_existing(name)
        if self._system_seconds:
            self._system = SystemMetrics(self._system_seconds, self.metrics, self.run_dir)
        self._catch_termination()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
        if self._system is not None:
            self._system.stop()
        for name in _LAST:
            self._log_existing(name)
        if self._journal is None:
            self._writer.submit(_end, self._run, status(error))
            self._writer.close()

    @property
    def uri(self) -> str:
        """URI of the store; a sqlite path in it is absolute."""
        return self._writer.uri

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty if the store was lost, or in a point of a sweep."""
        return (self._run.result() or "") if self._run is not None else ""

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters; a nested one is named by its dotted path, and long values are cut to MLflow's limit."""
        texts = {_key(name): _text(value)[:_VALUE_CHARACTERS] for name, value in _flat(values)}
        self._log_event(events.Params(texts))

    def metrics(self, values: Mapping[str, object], step: int = 0) -> None:
        """Log numbers of one step in one call; values that are None or no numbers are left out."""
        numbers = {_key(name): _number(value) for name, value in _flat(values)}
        known = {name: number for name, number in numbers.items() if number is not None}
        if known:
            self._log_event(events.Metrics(known, step))

    def figure(self, path: Path) -> None:
        """Log an image under figures/."""
        self.artifact(path, "figures")

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log any file of the run, such as the resolved config."""
        self._log_event(events.Artifact(str(Path(path).absolute()), folder))

    def report(self, report: Mapping[str, Any]) -> Path:
        """Write report.json, log it and its `metrics`, and register the output; returns the file's path.

        The file is written after everything else is logged, so its existence means that the run is finished.
        """
        self.metrics(report.get("metrics", {}))
        self._log_tags(report)
        if self._register:
            self._log_event(self._registered(self._register, report))
        path = write_report(self.run_dir, report)
        self.artifact(path)
        return path

    def _registered(self, name: str, report: Mapping[str, Any]) -> events.Registered:
        kept = {key: value for key, value in _flat(report.get("metrics", {})) if _number(value) is not None}
        tags = {"job": report["job"], "run_dir": as_given(str(self.run_dir.absolute())), **kept}
        source = as_given(str(report["output"]))
        return events.Registered(name, source, {_key(key): _text(value) for key, value in tags.items()})

    def _log_tags(self, report: Mapping[str, Any]) -> None:
        tags = {} if self._tags_of is None else self._tags_of(report)
        if tags:
            self._log_event(events.Tags({_key(name): text[:TAG_CHARACTERS] for name, text in tags.items()}))

    def _log_existing(self, name: str) -> None:
        if (self.run_dir / name).exists():
            self.artifact(self.run_dir / name)

    def _log_event(self, event: events.Event) -> None:
        if self._journal is not None:
            self._journal.write(event)
        elif self._run is None:
            raise ValueError("a Tracker logs only inside its `with` block")
        else:
            self._writer.submit(_write, self._run, event)

    def _catch_termination(self) -> None:
        """Make SIGTERM raise SystemExit: by default it would end the process before the run can be marked as killed."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._previous_handler = signal.signal(signal.SIGTERM, _terminate)


def _create(client: "MlflowClient", experiment: str, name: str, run_dir: Path) -> str:
    run = client.create_run(experiment, run_name=name, tags=run_tags(run_dir))
    return str(run.info.run_id)


def _write(client: "MlflowClient", experiment: str, run: "Future[str | None]", event: events.Event) -> None:
    # The run's future is done: the run was created earlier in the same thread.
    events.write(client, str(run.result()), [event])


def _end(client: "MlflowClient", experiment: str, run: "Future[str | None]", run_status: str) -> None:
    client.set_terminated(str(run.result()), status=run_status)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of nested mappings under their dotted path; lists are leaves."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _key(name: str) -> str:
    """A name with only the characters that MLflow allows, cut to its limit."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:_KEY_CHARACTERS]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value in JSON's types: mappings, lists, strings, finite numbers, booleans and null."""
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
