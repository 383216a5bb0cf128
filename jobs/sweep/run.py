"""`hasten JOB --multirun`: runs all points of a sweep, reports results as they come, and resumes a stopped sweep."""

import hashlib
import json
import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from hasten.accel.errors import UserError
from hasten.cluster.programs.sweep_points import Ending, Work, is_finished, metrics_of, read_point
from hasten.cluster.runtime.placement import check as check_placement
from hasten.cluster.runtime.session import session
from hasten.cluster.runtime.visibility import check as check_files
from hasten.cluster.tracking.sweep import SweepTracker
from hasten.cluster.tracking.tracker import write_report
from hasten.jobs.cli.options import options, split_off
from hasten.jobs.cli.quotes import split
from hasten.jobs.common.logs import log_to_folder
from hasten.jobs.common.progress import Progress
from hasten.jobs.common.records import Record
from hasten.jobs.common.schema import Tracking
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.sweep.dimensions import Words, read
from hasten.jobs.sweep.grid import grid
from hasten.jobs.sweep.launcher import RayLauncher
from hasten.jobs.sweep.objectives import objectives, sampler
from hasten.jobs.sweep.options import PREFIX, SweepConfig
from hasten.jobs.sweep.points import Point, Points
from hasten.jobs.sweep.results import Row, failures, table

if TYPE_CHECKING:
    from hasten.jobs.sweep.study import Study

_LOG = logging.getLogger(__name__)
STATE = "sweep.json"
# Minimum interval between two reports of a running sweep.
_REPORT_SECONDS = 5.0


def run(job: Job, words: Sequence[str]) -> tuple[Path, int]:
    """Run a sweep; returns the path of its report and the exit code: 1 if a point failed, 130 if it was interrupted.

    UserError for a mistake in any point, before the first one starts.
    """
    return Sweep(job, words).run()


def check(job: Job, words: Sequence[str]) -> None:
    """UserError for a mistake in any point of a sweep, as far as it can be found outside of the sweep's cluster."""
    Sweep(job, words, query_stores=False).check()


class Sweep:
    """One sweep in its folder; the launcher takes its points from it.

    query_stores: whether fingerprints include the versions of inputs at URIs, which needs access to the stores.
    """

    def __init__(self, job: Job, words: Sequence[str], query_stores: bool = True) -> None:
        self._job, self._sweep_words = job, list(words)
        self._settings, words = split_off(SweepConfig, PREFIX, words)
        self._words = read(words, [item.key for item in options(job.options) if item.group])
        for dimension in self._words.dimensions:
            if dimension.key in ("run_dir", "address") or dimension.key.startswith("tracking."):
                raise UserError(f"{dimension.key} applies to the whole sweep: give it one value")
        if "://" in (_value(self._words, "run_dir") or ""):
            raise UserError("run_dir of a sweep must be a folder; outputs of points may go to output=URI/{point}")
        self.folder = Path(_value(self._words, "run_dir") or _default_folder(job.title, words)).expanduser().absolute()
        self._sampler = sampler(self._settings, self._words.is_discrete)
        self._objectives = objectives(job, self._settings, self._sampler != "grid")
        fixed = [word for word in self._words.fixed if word.partition("=")[0] not in ("run_dir", "address")]
        self._points = Points(job, fixed, self.folder, query_stores)
        self._rows: dict[str, Row] = {}
        self._waiting: list[Point] = []
        # Points to check: all of a grid, else one for every value and bound of an option.
        self._examples: list[Point] = []
        self._trials: dict[str, list[int]] = {}
        self._study: Study | None = None
        self._launcher = RayLauncher(self._settings.retries, self._settings.at_once)
        self._interrupted = False
        self._started_at = self._reported_at = 0.0

    def run(self) -> tuple[Path, int]:
        """Run the sweep; returns the path of its report and the exit code."""
        self.check()
        self._points.check_inputs(self._examples)
        example = max(self._examples, key=lambda point: sum(bundle.get("CPU", 0) for bundle in self._needs(point)))
        work = self._points.work(example)
        address = self._settings.address or _value(self._words, "address")
        cpus = self._settings.cpus or int(sum(bundle.get("CPU", 0) for bundle in work.needs))
        with session(address, cpus, exactly=self._settings.cpus is not None):
            self._check_cluster()
            with self._locked():
                log_to_folder(self.folder)
                key = self._state()["key"]
                self._open_study()
                title = f"{self._job.title} sweep"
                with (
                    self._tracked(example.config.tracking, title, key) as self._tracker,
                    Progress(title, self._total(), "point") as self._progress,
                ):
                    self._tracker.params(dict(map(split, self._words.fixed)))
                    self._skip_finished()
                    if self._waiting or self._study:
                        count = self._launcher.pool.warm_up(
                            work, [self._job.module, "hasten.jobs.common.run", "hasten.cluster.tracking.tracker"]
                        )
                        _LOG.info("%d point%s at once", count, "s" * (count != 1))
                    self._started_at = perf_counter()
                    with self._interruptible():
                        self._launcher.stream(self)
                    path = self._write_report()
                    failed = any(row.status == "failed" for row in self._rows.values())
                    status = "KILLED" if self._is_incomplete else "FAILED" if failed else "FINISHED"
                    self._tracker.finish(status, self._metrics(), [path, self.folder / "hasten.log"])
        self._print()
        return path, 130 if self._is_incomplete else 1 if failed else 0

    def next(self) -> Work | None:
        """Work of the next point; None if there is none."""
        while True:
            point = self._next_point()
            if point is None:
                return None
            row = self._rows.setdefault(point.name, Row(point))
            if row.status in ("waiting", "stopped"):
                return self._points.work(point)
            if row.status != "running":  # Optuna chose a finished point again
                self._tell(row)

    def left(self) -> int:
        """Maximum number of points still to come."""
        return len(self._waiting) if self._study is None else int(self._study.left)

    def started(self, work: Work) -> None:
        """Note that a point was handed to the cluster."""
        self._rows[work.name].status = "running"
        self._tracker.begin(work.name, work.folder)

    def ended(self, work: Work, ending: Ending) -> None:
        """Show and track the end of a point, and tell Optuna."""
        row = self._rows[work.name]
        row.status, row.seconds, row.error, row.repeated = (
            ending.status,
            ending.seconds,
            ending.error,
            ending.repeated,
        )
        if ending.status == "stopped":
            return
        row.metrics = ending.metrics
        self._tell(row)
        self._track_end(row)
        done = [other for other in self._rows.values() if other.status in ("finished", "failed")]
        _LOG.info("%d of %d: %s", len(done), self._total(), row.line(self._objectives.shown))
        self._progress.update(len(done))
        if perf_counter() - self._reported_at > _REPORT_SECONDS:
            self._write_report()

    def waiting(self) -> None:
        """Called while points run: write their new events to MLflow."""
        self._tracker.poll()

    @property
    def _is_incomplete(self) -> bool:
        """Whether the sweep was interrupted before its last point."""
        if not self._interrupted:
            return False
        has_more = bool(self._waiting) or (self._study is not None and self._study.left > 0)
        return has_more or any(row.status in ("stopped", "waiting", "running") for row in self._rows.values())

    def _total(self) -> int:
        return self._settings.trials if self._sampler != "grid" else len(self._rows)

    def check(self) -> None:
        """UserError for a mistake in any point of the sweep. Writes nothing."""
        if self._sampler == "grid":
            for values in grid(self._words.dimensions):
                point = self._points.make(values)
                if point.name not in self._rows:
                    self._rows[point.name] = Row(point)
                    self._waiting.append(point)
            if not self._waiting:
                raise UserError("the sweep has no points: an option has an empty list of values")
            self._examples = list(self._waiting)
            return
        first = {dimension.key: dimension.ends()[0] for dimension in self._words.dimensions}
        if not first:
            raise UserError(f"sweep.sampler={self._sampler} needs an option with several values, such as bits=2,3,4")
        for dimension in self._words.dimensions:
            for text in dimension.ends():
                self._examples.append(self._points.make({**first, dimension.key: text}))

    def _check_cluster(self) -> None:
        """UserError if the cluster cannot run a point, or if one of its nodes does not see the points' files."""
        for needs in {str(needs): needs for needs in map(self._needs, self._examples)}.values():
            check_placement(needs, "a point of the sweep")
        files = [(self._points.reads(point), self._points.writes(point)) for point in self._examples]
        for reads, writes in {str(both): both for both in files}.values():
            check_files(reads, {"run_dir": self.folder, **writes})

    def _needs(self, point: Point) -> Sequence[Mapping[str, float]]:
        return self._points.work(point).needs

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Context with the sweep's lock; UserError if another process runs the sweep."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", timeout=1)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"another process runs the sweep in {self.folder}: wait for it, or give another run_dir"
            ) from None
        except OSError as error:
            raise UserError(f"run_dir={self.folder} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def _state(self) -> Record:
        """Write and return sweep.json: the sweep's words and its lasting key. UserError for another job's folder."""
        path = self.folder / STATE
        title = self._job.title
        state: Record = {"job": title, "key": uuid.uuid4().hex, "words": self._sweep_words}
        if path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
                if before["job"] != title:
                    raise UserError(f"run_dir={self.folder} holds a sweep of {before['job']}: give another run_dir")
                state["key"] = before["key"]
            except (ValueError, KeyError):
                raise UserError(f"{path} is damaged: remove it; finished points are kept") from None
        unfinished = path.with_name(f".{STATE}")
        unfinished.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return state

    def _open_study(self) -> None:
        if self._sampler != "grid":
            # A grid does not need Optuna, whose import takes a second.
            from hasten.jobs.sweep.study import Study

            settings = self._settings
            self._study = Study(
                self.folder,
                self._words.dimensions,
                self._objectives.directions,
                self._sampler,
                settings.seed,
                settings.trials,
            )

    def _tracked(self, tracking: Tracking, title: str, key: str) -> SweepTracker:
        name = tracking.name or f"{title} {self.folder.name}"
        return SweepTracker(tracking.uri, tracking.experiment, name, key, self.folder)

    def _skip_finished(self) -> None:
        """Take points that an earlier run of this sweep finished out of the queue."""
        unfinished = []
        for point in self._waiting:
            if self._has_finished(self._rows[point.name]):
                self._track_end(self._rows[point.name])
            else:
                unfinished.append(point)
        self._waiting = unfinished
        done = len(self._rows) - len(unfinished)
        if done:
            _LOG.info("%d of %d points are finished already in %s", done, self._total(), self.folder)
        self._progress.begin(done)

    def _has_finished(self, row: Row) -> bool:
        folder = row.point.folder
        if not is_finished(folder, self._points.sends(row.point)):
            return False
        row.status, row.repeated = "finished", True
        row.seconds, row.metrics = read_point(folder).get("seconds"), metrics_of(folder)
        return True

    def _next_point(self) -> Point | None:
        if self._study is None:
            return self._waiting.pop(0) if self._waiting else None
        trial = self._study.ask()
        if trial is None:
            return None
        number, values = trial
        point = self._points.make(values)
        self._trials.setdefault(point.name, []).append(number)
        row = self._rows.setdefault(point.name, Row(point))
        if row.status == "waiting" and self._has_finished(row):
            self._track_end(row)
        return point

    def _tell(self, row: Row) -> None:
        """Tell Optuna the metrics of a point; a point without them counts as failed."""
        if self._study is None:
            return
        for number in self._trials.pop(row.point.name, ()):
            values = None
            if row.status == "finished":
                try:
                    values = self._objectives.values(row.metrics)
                except UserError as error:
                    row.status, row.error = "failed", {"type": "UserError", "message": str(error)}
            self._study.tell(number, values)

    def _track_end(self, row: Row) -> None:
        error = f"{row.error['type']}: {row.error['message']}" if row.error else None
        status = "FAILED" if row.status == "failed" else "FINISHED"
        self._tracker.end(row.point.name, row.point.folder, status, error)

    def _metrics(self) -> dict[str, float]:
        """Metrics of the sweep itself; seconds: since the start of the first point."""
        counts = [row.status for row in self._rows.values()]
        return {
            "points": len(counts),
            "finished": counts.count("finished"),
            "failed": counts.count("failed"),
            "repeated": sum(row.repeated for row in self._rows.values()),
            "seconds": perf_counter() - self._started_at,
        }

    def _write_report(self) -> Path:
        self._reported_at = perf_counter()
        return write_report(
            self.folder,
            {
                "job": "sweep",
                "sweep_of": self._job.title,
                "config": {"words": self._sweep_words, "sweep": vars(self._settings), "sampler": self._sampler},
                "varied": [dimension.key for dimension in self._words.dimensions],
                "objectives": self._objectives.plain,
                "metrics": self._metrics(),
                "layers": [],
                "output": None,
                "points": [row.plain(self.folder) for row in self._rows.values()],
            },
        )

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Context in which Ctrl-C once lets running points finish, and twice, or SIGTERM, stops them, to be resumed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        pool = self._launcher.pool

        def interrupt(number: int, frame: FrameType | None) -> None:
            # `hasten stop` of a submitted sweep sends one signal, and SIGKILL half a minute later.
            pool.stopping = pool.draining or number == signal.SIGTERM or "RAY_JOB_STOP_SIGNAL" in os.environ
            pool.draining = self._interrupted = True
            running = sum(row.status == "running" for row in self._rows.values())
            if pool.stopping:
                _LOG.warning("stopping; the same command resumes the sweep")
            else:
                _LOG.warning("interrupted: waiting for %d running points; interrupt once more to stop them", running)

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _print(self) -> None:
        rows = list(self._rows.values())
        ascending = not self._objectives.directions or self._objectives.directions[0] == "minimize"
        for line in table(rows, self._objectives.shown, ascending):
            print(line)
        bad = failures(rows)
        if bad:
            print("\n".join([f"{len(bad)} of {len(rows)} points failed:", *bad]))
        print(f"compare: hasten report {self.folder}")


def _value(words: Words, key: str) -> str | None:
    """Text of an option in the sweep's fixed words, None if it is not given."""
    return next((text for name, text in map(split, words.fixed) if name == key), None)


def _default_folder(title: str, words: Sequence[str]) -> Path:
    """Default folder, the same for the same words, so that the same command resumes the sweep."""
    mark = hashlib.sha256(json.dumps(sorted(words)).encode()).hexdigest()[:8]
    return Path("runs", "sweeps", f"{title}-{mark}")
