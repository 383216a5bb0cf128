"""Reads folders of runs and sweeps, finished or not, as entries to compare."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from hasten.accel.errors import UserError
from hasten.jobs.common.logs import LOG_FILE
from hasten.jobs.descriptors.registry import jobs
from hasten.jobs.report.metrics import number

_EXPECTED = "expected the folder of a run or of a sweep, or its report.json"
# Job name of a run whose files do not name the job.
_UNKNOWN = "run"
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_RAISED = re.compile(r"([A-Za-z_][\w.]*(?:\(\w+\))?)(?:: (.*))?$")


@dataclass(frozen=True)
class Failure:
    """Error that ended a run: class of the exception and first line of its message."""

    type: str
    message: str


@dataclass(frozen=True)
class Objective:
    """A metric that a sweep optimises; direction: minimize or maximize."""

    metric: str
    direction: str

    @property
    def sign(self) -> int:
        """1 if less is better, -1 if more is."""
        return 1 if self.direction == "minimize" else -1


@dataclass(frozen=True)
class Entry:
    """A run, a point of a sweep, or one budget of a run with several.

    status: finished, failed, running, waiting, stopped, or unfinished: without a report for an unknown reason.
    values: options that the sweep varied. config: the whole configuration from report.json or config.yaml, else empty.
    report: report.json without job, config and metrics, empty if it is missing.
    """

    job: str
    name: str
    folder: Path
    status: str
    values: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, object] = field(default_factory=dict)
    seconds: float | None = None
    failure: Failure | None = None
    report: Mapping[str, object] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run finished, so that its metrics are comparable."""
        return self.status == "finished"


@dataclass(frozen=True)
class Source:
    """Contents of one argument. varied: options to which a sweep gave several values; None for a single run."""

    folder: Path
    entries: tuple[Entry, ...]
    varied: tuple[str, ...] | None = None
    objectives: tuple[Objective, ...] = ()


def read(paths: Sequence[Path]) -> list[Source]:
    """Read the folders; UserError if one is neither run nor sweep, is damaged, or if no run has finished."""
    folders = [path.parent if path.name == "report.json" and path.is_file() else path for path in paths]
    repeated = {folder for folder in folders if [other.resolve() for other in folders].count(folder.resolve()) > 1}
    if repeated:
        raise UserError(f"{sorted(repeated)[0]} is given twice: name every run and sweep once")
    sources = [_source(folder) for folder in folders]
    entries = [entry for source in sources for entry in source.entries]
    if not any(entry.finished for entry in entries):
        counts = ", ".join(f"{count} {status}" for status, count in _counts(entries).items()) or "it has no points"
        raise UserError(
            f"{', '.join(map(str, folders))}: nothing has finished yet ({counts}{_first_failure(entries)}): "
            "expected at least one finished run or point"
        )
    return sources


def entry_of_point(folder: Path, job: str, row: Mapping[str, object]) -> Entry:
    """A point from its row in the sweep's report or its point.json, and from the files in its folder."""
    report: dict[str, object] = {}
    damage = None
    if (folder / "report.json").exists():
        try:
            report = _report(folder / "report.json")
        except UserError as error:  # show the other points
            damage = Failure("damaged", str(error))
    status = str(row.get("status") or ("finished" if report else "unfinished"))
    if damage and status == "finished":
        status = "failed"
    if report and status != "failed":
        # A point writes its report last, so it finished, even if its sweep was killed before noting this.
        status = "finished"
    metrics = _mapping(row.get("metrics")) or _mapping(report.get("metrics"))
    seconds = row.get("seconds")
    return Entry(
        job=str(report.get("job", job)) if job == _UNKNOWN else job,
        name=str(row.get("name", folder.name)),
        folder=folder,
        status=status,
        values=_mapping(row.get("values")),
        config=_mapping(report.get("config")) or _config(folder),
        metrics=metrics,
        seconds=number(metrics.get("seconds") if seconds is None else seconds),
        failure=damage or _failure(row.get("error"), status, folder),
        report=_without_main_keys(report),
    )


def _source(folder: Path) -> Source:
    if not folder.exists():
        raise UserError(f"{folder} does not exist: {_EXPECTED}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: {_EXPECTED}")
    if (folder / "report.json").exists():
        report = _report(folder / "report.json")
        if report["job"] == "sweep":
            return _sweep(folder, report)
        return Source(folder, tuple(_budgets(_finished(folder, folder.name, report))))
    if (folder / "sweep.json").exists() or (folder / "points").is_dir():
        return _unfinished_sweep(folder)
    if (folder / "config.yaml").exists():
        return Source(folder, (_without_report(folder, folder.name, _job_of(folder)),))
    inside = sorted(path.parent for path in folder.glob("*/report.json"))
    hint = f"; there are runs in it, such as {inside[0]}" if inside else ""
    raise UserError(
        f"{folder} is neither run nor sweep, as it has no report.json, config.yaml or sweep.json: {_EXPECTED}{hint}"
    )


def _sweep(folder: Path, report: Mapping[str, object]) -> Source:
    job = str(report.get("sweep_of", _UNKNOWN))
    rows = _listed(folder, report, "points")
    points = [entry_of_point(folder / str(row["folder"]), job, row) for row in rows]
    # A sweep may have started points between its last report and a kill.
    known = {point.folder.name for point in points}
    points += [_unreported_point(path, job) for path in _point_folders(folder) if path.name not in known]
    return _as_source(folder, report, points)


def _unfinished_sweep(folder: Path) -> Source:
    """A sweep without a report, read from the files of its points."""
    plan = _json(folder / "sweep.json") if (folder / "sweep.json").exists() else {}
    job = str(plan.get("sweep_of") or plan.get("job") or _UNKNOWN)
    return _as_source(folder, plan, [_unreported_point(path, job) for path in _point_folders(folder)])


def _point_folders(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "points").glob("*") if path.is_dir())


def _unreported_point(folder: Path, job: str) -> Entry:
    """A point that its sweep's report does not list."""
    try:
        row = _json(folder / "point.json") if (folder / "point.json").exists() else {}
    except UserError as error:
        row = {"status": "failed", "error": {"type": "damaged", "message": str(error)}}
    return entry_of_point(folder, job, row)


def _as_source(folder: Path, plan: Mapping[str, object], points: Sequence[Entry]) -> Source:
    varied = plan.get("varied")
    if not isinstance(varied, list) or not varied:
        varied = list(dict.fromkeys(key for point in points for key in point.values))
    objectives = tuple(
        Objective(str(row["metric"]), str(row.get("direction", "minimize"))) for row in _rows(plan.get("objectives"))
    )
    entries = tuple(entry for point in points for entry in _budgets(point))
    return Source(folder, entries, tuple(map(str, varied)), objectives)


def _failure(error: object, status: str, folder: Path) -> Failure | None:
    if isinstance(error, Mapping):
        return Failure(str(error.get("type") or "error"), str(error.get("message") or ""))
    if status != "failed":
        return None
    return _from_log(folder / LOG_FILE) or Failure("unknown", str(error or "see the log"))


def _finished(folder: Path, name: str, report: Mapping[str, object]) -> Entry:
    metrics = _mapping(report["metrics"])
    return Entry(
        job=str(report["job"]),
        name=name,
        folder=folder,
        status="finished",
        config=_mapping(report.get("config")),
        metrics=metrics,
        seconds=number(metrics.get("seconds")),
        report=_without_main_keys(report),
    )


def _without_report(folder: Path, name: str, job: str) -> Entry:
    failure = _from_log(folder / LOG_FILE)
    status = "failed" if failure else "unfinished"
    return Entry(job, name, folder, status, config=_config(folder), failure=failure)


def _budgets(entry: Entry) -> Iterator[Entry]:
    """The run, or an entry for each of its budgets, whose metrics replace the run's."""
    rows = entry.report.get("budgets")
    if not entry.finished or not isinstance(rows, list) or not rows or not all("budget" in row for row in rows):
        yield entry
        return
    for row in rows:
        budget = row["budget"]
        numbers = {key: value for key, value in row.items() if not isinstance(value, (list, dict, str))}
        layers = [layer for layer in _rows(entry.report.get("layers")) if layer.get("budget", budget) == budget]
        yield replace(
            entry,
            name=f"{entry.name}, budget {budget:g}" if len(rows) > 1 else entry.name,
            values={**entry.values, "budget": budget} if len(rows) > 1 else entry.values,
            metrics={**entry.metrics, **numbers},
            report={**entry.report, **row, "layers": layers},
        )


def _mapping(value: object) -> Mapping[str, object]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _rows(value: object) -> list[Mapping[str, object]]:
    """The value if it is a JSON list, of objects; else an empty list."""
    return value if isinstance(value, list) else []


def _without_main_keys(report: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in report.items() if key not in ("job", "config", "metrics")}


def _report(path: Path) -> dict[str, object]:
    report = _json(path)
    if not isinstance(report.get("job"), str) or not isinstance(report.get("metrics"), dict):
        raise UserError(f"{path} is no report of a run or sweep: expected the keys job and metrics in it")
    return report


def _json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is damaged: expected whole JSON, but line {error.lineno} has {_lower(error.msg)}; "
            "run it again, or leave it out"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no report of a run or sweep: expected an object with the keys job and metrics")
    return content


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _listed(folder: Path, report: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    rows = report.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "folder" in row for row in rows):
        raise UserError(f"{folder / 'report.json'} is no report of a sweep: expected {key}, each with its folder")
    return rows


def _config(folder: Path) -> dict[str, object]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return config if isinstance(config, dict) else {}


def _job_of(folder: Path) -> str:
    """Job of a run without a report, from its folder if that is the default runs/JOB/DATE_TIME."""
    return folder.absolute().parent.name if folder.absolute().parent.name in jobs() else _UNKNOWN


def _from_log(path: Path) -> Failure | None:
    """The error of a log that ends with the traceback of a failed run, else None."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    stamped = [number for number, line in enumerate(lines) if _STAMP.match(line)]
    if not stamped or not lines[stamped[-1]].endswith("the run failed"):
        return None
    raised = [match for match in map(_RAISED.match, lines[stamped[-1] + 1 :]) if match]
    return Failure(raised[-1][1].rpartition(".")[2], raised[-1][2] or "") if raised else None


def _counts(entries: Sequence[Entry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.status] = counts.get(entry.status, 0) + 1
    return counts


def _first_failure(entries: Sequence[Entry]) -> str:
    failures = [entry.failure for entry in entries if entry.failure]
    return f"; the first failure: {failures[0].type}: {failures[0].message}" if failures else ""
