"""The points of a sweep: the config of each, what it is found again by, where it lies and what it takes."""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hasten.accel.errors import UserError
from hasten.cluster.programs.sweep_points import Work
from hasten.cluster.storage.remote import Remote, in_place, is_uri
from hasten.jobs.cli.compose import compose, plain
from hasten.jobs.cli.execute import run_job
from hasten.jobs.cli.options import options, value_at
from hasten.jobs.common.schema import Run
from hasten.jobs.descriptors.descriptor import Job

# What tells a file or folder from another of the same name, as JSON; None where nothing does.
Identity = object

# Options that say where and how a run is kept, or on which processors, and nothing of what comes out.
_ELSEWHERE = ("run_dir", "cache", "tracking", "address", "overwrite")
_NAME_CHARACTERS = 80
# Larger files are told apart by size and time alone.
_HASHED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Point:
    """One setting. values: of the swept options, by key, as texts; config: resolved, an object of the job's schema."""

    name: str
    fingerprint: str
    values: Mapping[str, str]
    config: Run

    @property
    def folder(self) -> Path:
        """Where its run lies."""
        return Path(str(self.config.run_dir))


class Points:
    """Makes the points of one sweep. fixed: `key=value` words of every point; folder: of the sweep.

    looks: whether stores are asked about what a point reads by URI, for its fingerprint.
    """

    def __init__(
        self,
        job: Job,
        fixed: Sequence[str],
        folder: Path,
        looks: bool = True,
    ) -> None:
        self._job = job
        self._fixed, self._folder = list(fixed), folder
        self._options, self._looks = options(job.options), looks
        self._identities: dict[str | None, Identity] = {}
        self._given = {word.partition("=")[0] for word in fixed}
        self._taken: dict[tuple[str, str], str] = {}

    def make(self, values: Mapping[str, str]) -> Point:
        """The point with these values; UserError where a value is wrong, before anything runs."""
        words = [*self._fixed, *(f"{key}={text}" for key, text in values.items())]
        config = compose(self._job.name, self._job.options, words)
        print_ = fingerprint(self._job, config, self._identities, self._looks)
        label = ",".join(f"{key}={text}" for key, text in values.items())
        label = re.sub(r"[^\w.,=+-]+", "_", label, flags=re.ASCII)
        name = f"{label[:_NAME_CHARACTERS]}-{print_[:8]}".lstrip("-")
        self._place(config, name, values)
        return Point(name, print_, dict(values), config)

    def work(self, point: Point) -> Work:
        """The point as the cluster runs it."""
        cpus, gpus, threads, bundles = self._job.needs_of(point.config)
        return Work(
            point.name,
            point.folder,
            partial(run_job, self._job.name, self._job.variant, point.config),
            {"values": dict(point.values), "fingerprint": point.fingerprint},
            cpus,
            gpus,
            threads,
            bundles,
            self.sends(point),
        )

    def sends(self, point: Point) -> bool:
        """Whether a point sends what it makes to a store by its URI, which it does after it wrote its report."""
        texts = [value_at(point.config, item.key) for item in self._options if item.path in ("out", "state")]
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
            text = value_at(point.config, item.key) if item.path == "out" else None
            if text and not is_uri(text) and not Path(text).is_relative_to(self._folder):
                found[item.key] = Path(text).expanduser().parent
        return found

    def _inputs(self, point: Point) -> list[tuple[str, str]]:
        """Options that are read, with their texts, where they are no URIs."""
        texts = [(item.key, value_at(point.config, item.key)) for item in self._options if item.path == "in"]
        return [(key, text) for key, text in texts if text and not is_uri(text)]

    def _place(self, config: Run, name: str, values: Mapping[str, str]) -> None:
        """Give the point a folder of its own, and what it makes a place that no other point has."""
        config.run_dir = str(self._folder / "points" / name)
        for item in self._options:
            if item.path not in ("out", "state") or item.key == "run_dir":
                continue
            text = getattr(config, item.key)
            if item.path == "state" and (text is None or self._job.shares_state):
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
            elif not self._job.output_in_run_dir:
                setattr(config, item.key, str(Path(config.run_dir, item.key)))


def fingerprint(job: Job, config: Run, identities: dict[str | None, Identity] | None = None, looks: bool = True) -> str:
    """Hex digits of what a run's result depends on: its resolved config, and the files that it reads.

    identities: of the files that were looked at before, which other points read as well. looks: whether stores are
    asked about what is given by URI.
    """
    identities = {} if identities is None else identities
    resolved = {key: value for key, value in plain(config).items() if key not in _ELSEWHERE}
    inputs = {}
    for item in options(job.options):
        if item.path == "out":
            resolved.pop(item.key, None)
        elif item.path == "in":  # what a run changes itself would never be the same again
            value = value_at(config, item.key)
            if value not in identities:
                identities[value] = _identity(value, item.key, looks)
            inputs[item.key] = identities[value]
    text = json.dumps([job.name, job.variant, resolved, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(value: str | None, key: str, looks: bool) -> Identity:
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


def _file_identity(path: Path) -> list[int | str]:
    found = path.stat()
    if found.st_size > _HASHED_BYTES:
        return [found.st_size, found.st_mtime_ns]
    return [found.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
