"""The points of a sweep: config, fingerprint, folder and resources of each."""

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
from hasten.jobs.cli.compose import compose
from hasten.jobs.cli.execute import run_job
from hasten.jobs.cli.options import options, value_at
from hasten.jobs.cli.quotes import verbatim
from hasten.jobs.common.schema import Run, plain
from hasten.jobs.descriptors.descriptor import Job

# Identity of a file's or folder's content, a JSON value; None if it is unknown.
Identity = object

# Options that affect where a run is stored, tracked or executed, but not its results.
_NO_RESULT_KEYS = ("run_dir", "cache_folder", "tracking", "address", "overwrite")
_NAME_CHARACTERS = 80
# Larger files are identified by size and modification time.
_HASHED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Point:
    """One setting. values: texts of the swept options, by key. config: resolved, an object of the job's dataclass."""

    name: str
    fingerprint: str
    values: Mapping[str, str]
    config: Run

    @property
    def folder(self) -> Path:
        """Folder of its run."""
        return Path(str(self.config.run_dir))


class Points:
    """Makes the points of one sweep. fixed: `key=value` words of every point. folder: the sweep's.

    query_stores: whether fingerprints include the versions of inputs at URIs, which needs access to the stores.
    """

    def __init__(
        self,
        job: Job,
        fixed: Sequence[str],
        folder: Path,
        query_stores: bool = True,
    ) -> None:
        self._job = job
        self._fixed, self._folder = list(fixed), folder
        self._options, self._query_stores = options(job.options), query_stores
        self._identities: dict[str | None, Identity] = {}
        self._fixed_keys = {word.partition("=")[0] for word in fixed}
        self._taken: dict[tuple[str, str], str] = {}

    def make(self, values: Mapping[str, str]) -> Point:
        """The point with these values; UserError if a value is wrong."""
        words = [*self._fixed, *(verbatim(key, text) for key, text in values.items())]
        config = compose(self._job.name, self._job.options, words)
        digest = fingerprint(self._job, config, self._identities, self._query_stores)
        label = ",".join(f"{key}={text}" for key, text in values.items())
        label = re.sub(r"[^\w.,=+-]+", "_", label, flags=re.ASCII)
        name = f"{label[:_NAME_CHARACTERS]}-{digest[:8]}".lstrip("-")
        self._place(config, name, values)
        return Point(name, digest, dict(values), config)

    def work(self, point: Point) -> Work:
        """The point as work for the cluster."""
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
        """Whether a point uploads outputs to a store, which it does after it wrote its report."""
        texts = [value_at(point.config, item.key) for item in self._options if item.path in ("out", "state")]
        return any(text and is_uri(text) and in_place(text) is None for text in texts)

    def check_inputs(self, points: Sequence[Point]) -> None:
        """UserError for an input path of a point that does not exist."""
        for key, text in {(key, text) for point in points for key, text in self._inputs(point)}:
            with contextlib.suppress(OSError):
                if text.startswith(("/", "./", "../", "~")) and not Path(text).expanduser().exists():
                    raise UserError(f"{key}={text} does not exist: expected a path on this machine, a name, or a URI")

    def reads(self, point: Point) -> dict[str, Path]:
        """Local files and folders that a point reads, by option."""
        paths = {}
        for key, text in self._inputs(point):
            with contextlib.suppress(OSError):  # too long for a path
                path = Path(text).expanduser()
                if path.exists():
                    paths[key] = path
        return paths

    def writes(self, point: Point) -> dict[str, Path]:
        """Local folders, besides the point's own, that its outputs are written to, by option."""
        folders = {}
        for item in self._options:
            text = value_at(point.config, item.key) if item.path == "out" else None
            if text and not is_uri(text) and not Path(text).is_relative_to(self._folder):
                folders[item.key] = Path(text).expanduser().parent
        return folders

    def _inputs(self, point: Point) -> list[tuple[str, str]]:
        """Key and text of every input that is not a URI."""
        texts = [(item.key, value_at(point.config, item.key)) for item in self._options if item.path == "in"]
        return [(key, text) for key, text in texts if text and not is_uri(text)]

    def _place(self, config: Run, name: str, values: Mapping[str, str]) -> None:
        """Set the point's folder and its outputs to places that no other point writes."""
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
            elif text is not None and item.key in self._fixed_keys:
                raise UserError(
                    f"{item.key}={text} would be every point's: "
                    + ("leave it out, " if item.path == "state" else "leave it out, which puts it into its folder, ")
                    + f"or write {item.key}={text.rstrip('/')}/{{point}}"
                )
            elif not self._job.output_in_run_dir:
                setattr(config, item.key, str(Path(config.run_dir, item.key)))


def fingerprint(
    job: Job, config: Run, identities: dict[str | None, Identity] | None = None, query_stores: bool = True
) -> str:
    """Hexadecimal digest of everything that a run's result depends on: its resolved config and its input files.

    identities: cache of the identities of files, shared by points. query_stores: whether to ask stores for the versions
    of inputs at URIs.
    """
    identities = {} if identities is None else identities
    resolved = {key: value for key, value in plain(config).items() if key not in _NO_RESULT_KEYS}
    inputs = {}
    for item in options(job.options):
        if item.path == "out":
            resolved.pop(item.key, None)
        elif item.path == "in":  # not `state`: the run itself changes such files
            value = value_at(config, item.key)
            if value not in identities:
                identities[value] = _identity(value, item.key, query_stores)
            inputs[item.key] = identities[value]
    text = json.dumps([job.name, job.variant, resolved, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(value: str | None, key: str, query_stores: bool) -> Identity:
    """Identity of a file's or folder's content; None for names and for paths that are not on this machine."""
    if not value:
        return None
    if is_uri(value):
        return Remote(value, key).files() if query_stores else None
    path = Path(value).expanduser()
    try:
        if path.is_file():
            return _file_identity(path)
        if path.is_dir():
            return {file.name: _file_identity(file) for file in sorted(path.iterdir()) if file.is_file()}
    except OSError:  # the run itself will report the problem
        pass
    return None


def _file_identity(path: Path) -> list[int | str]:
    stat = path.stat()
    if stat.st_size > _HASHED_BYTES:
        return [stat.st_size, stat.st_mtime_ns]
    return [stat.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
