"""The points of a sweep: the config of each, what it is found again by, where it lies and what it takes."""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hasten.accel.errors import UserError
from hasten.cluster.storage.remote import Remote, in_place, is_uri
from hasten.jobs.cli.options import Option, options
from hasten.jobs.common.schema import Run

# Options that say where and how a run is kept, or on which processors, and nothing of what comes out.
_ELSEWHERE = ("run_dir", "cache", "tracking", "address", "overwrite")
# Jobs whose results lie in run_dir if nothing else is said.
_IN_RUN_DIR = ("decode", "train_drafter")
_NAME_CHARACTERS = 80
# Larger files are told apart by size and time alone.
_HASHED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Point:
    """One setting. values: of the swept options, by key, as texts; config: resolved, an object of the job's schema."""

    name: str
    fingerprint: str
    values: Mapping[str, str]
    config: Any


class Points:
    """Makes the points of one sweep. name: of a benchmark, None for other jobs; folder: of the sweep.

    looks: whether stores are asked about what a point reads by URI, for its fingerprint.
    """

    def __init__(
        self,
        job: str,
        name: str | None,
        schema: type[Run],
        fixed: Sequence[str],
        folder: Path,
        looks: bool = True,
    ) -> None:
        self._job, self._name, self._schema = job, name, schema
        self._fixed, self._folder = list(fixed), folder
        self._options, self._looks = options(schema), looks
        self._identities: dict[str | None, Any] = {}
        self._given = {word.partition("=")[0] for word in fixed}
        self._taken: dict[tuple[str, str], str] = {}

    def make(self, values: Mapping[str, str]) -> Point:
        """The point with these values; UserError where a value is wrong, before anything runs."""
        from hasten.jobs.cli.compose import compose

        config = compose(self._job, self._schema, [*self._fixed, *(f"{key}={text}" for key, text in values.items())])
        print_ = fingerprint(self._job, self._name, config, self._options, self._identities, self._looks)
        label = ",".join(f"{key}={text}" for key, text in values.items())
        label = re.sub(r"[^\w.,=+-]+", "_", label, flags=re.ASCII)
        name = f"{label[:_NAME_CHARACTERS]}-{print_[:8]}".lstrip("-")
        self._place(config, name, values)
        return Point(name, print_, dict(values), config)

    def work(self, point: Point) -> Any:
        """The point as `hasten.cluster.programs.sweep_points.Work`."""
        from hasten.cluster.programs.sweep_points import Work

        cpus, gpus, threads, bundles = needs(self._job, point.config)
        return Work(
            point.name,
            Path(point.config.run_dir),
            partial(run_job, self._job, self._name, self._schema, point.config),
            {"values": dict(point.values), "fingerprint": point.fingerprint},
            cpus,
            gpus,
            threads,
            bundles,
            self.sends(point),
        )

    def sends(self, point: Point) -> bool:
        """Whether a point sends what it makes to a store by its URI, which it does after it wrote its report."""
        texts = [_at(point.config, item.key) for item in self._options if item.path in ("out", "state")]
        return any(text and is_uri(text) and in_place(text) is None for text in texts)

    def check_inputs(self, points: Sequence[Point]) -> None:
        """UserError for a path that a point is to read and that is not there."""
        for key, text in {(key, text) for point in points for key, text in self._inputs(point)}:
            with contextlib.suppress(OSError):
                if text.startswith(("/", "./", "../", "~")) and not Path(text).expanduser().exists():
                    raise UserError(f"{key}={text} is not there: expected a path on this machine, a name, or a URI")

    def reads(self, point: Point) -> dict[str, Path]:
        """Files and folders on this machine that a point reads, by option."""
        found = {}
        for key, text in self._inputs(point):
            with contextlib.suppress(OSError):  # no path, as long as it is
                path = Path(text).expanduser()
                if path.exists():
                    found[key] = path
        return found

    def writes(self, point: Point) -> dict[str, Path]:
        """Folders on this machine that a point's results go to, by option, beside its own folder."""
        found = {}
        for item in self._options:
            text = _at(point.config, item.key) if item.path == "out" else None
            if text and not is_uri(text) and not Path(text).is_relative_to(self._folder):
                found[item.key] = Path(text).expanduser().parent
        return found

    def _inputs(self, point: Point) -> list[tuple[str, str]]:
        """Options that are read, with their texts, where they are no URIs."""
        texts = [(item.key, _at(point.config, item.key)) for item in self._options if item.path == "in"]
        return [(key, text) for key, text in texts if text and not is_uri(text)]

    def _place(self, config: Any, name: str, values: Mapping[str, str]) -> None:
        """Give the point a folder of its own, and what it makes a place that no other point has."""
        config.run_dir = str(self._folder / "points" / name)
        for item in self._options:
            if item.path not in ("out", "state") or item.key == "run_dir":
                continue
            text = getattr(config, item.key)
            if item.path == "state" and (text is None or self._job == "bench"):
                continue
            if text is not None and (item.key in values or "{point}" in text):
                text = text.replace("{point}", name)
                setattr(config, item.key, text)
                if self._taken.setdefault((item.key, text), name) != name:
                    raise UserError(f"{item.key}={text} would be several points': write {item.key}={text}/{{point}}")
            elif text is not None and item.key in self._given:
                raise UserError(
                    f"{item.key}={text} would be every point's: "
                    + ("leave it out, " if item.path == "state" else "leave it out, which puts it into its folder, ")
                    + f"or write {item.key}={text.rstrip('/')}/{{point}}"
                )
            elif self._job not in _IN_RUN_DIR:
                setattr(config, item.key, str(Path(config.run_dir, item.key)))


def fingerprint(
    job: str,
    name: str | None,
    config: Any,
    known: Sequence[Option],
    identities: dict[str | None, Any] | None = None,
    looks: bool = True,
) -> str:
    """Hex digits of what a run's result depends on: its resolved config, and the files that it reads.

    identities: of the files that were looked at before, which other points read as well. looks: whether stores are
    asked about what is given by URI.
    """
    from hasten.jobs.cli.compose import plain

    identities = {} if identities is None else identities
    resolved = {key: value for key, value in plain(config).items() if key not in _ELSEWHERE}
    inputs = {}
    for item in known:
        if item.path == "out":
            resolved.pop(item.key, None)
        elif item.path == "in":  # what a run changes itself would never be the same again
            value = _at(config, item.key)
            if value not in identities:
                identities[value] = _identity(value, item.key, looks)
            inputs[item.key] = identities[value]
    text = json.dumps([job, name, resolved, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _at(config: Any, key: str) -> Any:
    """Value of an option, whose sections are dots in its key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _identity(value: str | None, key: str, looks: bool) -> Any:
    """What tells a file or folder from another of the same name; None for names, and what is not on this machine."""
    if not value:
        return None
    if is_uri(value):
        return Remote(value, key).files() if looks else None
    path = Path(value).expanduser()
    try:
        if path.is_file():
            return _file_identity(path)
        if path.is_dir():
            return {file.name: _file_identity(file) for file in sorted(path.iterdir()) if file.is_file()}
    except OSError:  # the run will say what is wrong with it
        pass
    return None


def _file_identity(path: Path) -> list[Any]:
    found = path.stat()
    if found.st_size > _HASHED_BYTES:
        return [found.st_size, found.st_mtime_ns]
    return [found.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]


def needs(job: str, config: Any) -> tuple[float, float, int, tuple[Mapping[str, float], ...]]:
    """What a run takes: CPUs and GPUs of its own process, threads of each process, and what it starts in the cluster.

    A job that hands its work to actors sleeps meanwhile; one that works itself takes its threads.
    """
    from hasten.jobs.common.arithmetic import resolve_device

    threads = int(getattr(config, "threads", 1))
    workers = int(getattr(config, "workers", 1))
    device = getattr(config, "device", "cpu")
    gpus = 1.0 if resolve_device(device) == "cuda" else 0.0
    if job == "bench":
        return float(threads), 0.0, threads, ()
    if job == "pretrain":  # processes of its own, beside Ray's
        return float(workers * threads), 0.0, threads, ()
    if hasattr(config, "workers"):
        actors = ({"CPU": float(threads), "GPU": gpus},) * workers
        if job == "decode" and workers > 1 and config.placement != "private":
            actors += ({"CPU": 1.0},) * config.drafter_actors
        return 0.0, 0.0, threads, actors
    return float(threads), gpus, threads, ()


def run_job(job: str, name: str | None, schema: type[Run], config: Any) -> None:
    """Run a job in this process as the command line would."""
    from hasten.jobs.common.run import execute, log_to_terminal, log_traceback

    log_to_terminal()
    try:
        execute(job, name, schema, config)
    except BaseException as error:
        log_traceback(error)
        raise
