"""Runs the points of a sweep as Ray tasks: as many at once as fit, each finished exactly once despite losses.

A point is finished when its folder has a report.json, which its job writes last. A task, started by a driver or by Ray
after the loss of a process or node, first checks for that file while it holds the folder's lock.
"""

import contextlib
import gc
import json
import logging
import os
import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from time import perf_counter, time
from typing import Any, Protocol

import ray
from filelock import FileLock, Timeout
from ray import ObjectRef

from hasten.accel.errors import UserError
from hasten.cluster.runtime.demand import Demand
from hasten.cluster.runtime.placement import check, grows, nodes, packs
from hasten.cluster.runtime.resources import release_memory
from hasten.cluster.tracking import journal
from hasten.cluster.tracking.environment import environment

_LOG = logging.getLogger(__name__)
REPORT, POINT, OUTPUT = "report.json", "point.json", "output.txt"
_LOCK = ".lock"
# How long a task waits for the folder's lock: a process that lost its driver ends within seconds.
_PATIENCE_SECONDS = 60.0
_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """One point: its function, folder and resources.

    facts: written to the folder's point.json. cpus, gpus: of the process that runs it. bundles: resources of the actors
    that it starts. sends: whether its output is uploaded to a store after the report was written.
    """

    name: str
    folder: Path
    function: Callable[[], None]
    facts: Mapping[str, object] = field(default_factory=dict)
    cpus: float = 1
    gpus: float = 0
    threads: int = 1
    bundles: tuple[Mapping[str, float], ...] = ()
    sends: bool = False

    @property
    def needs(self) -> list[Mapping[str, float]]:
        """Bundles of all resources that it occupies while it runs."""
        bundles = ({"CPU": self.cpus, "GPU": self.gpus}, *self.bundles)
        nonzero = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
        return [bundle for bundle in nonzero if bundle]


@dataclass(frozen=True)
class Ending:
    """How a point ended. status: finished, failed or stopped.

    error: type and message. repeated: whether it was finished before. metrics: those of its report.
    """

    status: str
    seconds: float = 0.0
    error: Mapping[str, str] | None = None
    repeated: bool = False
    metrics: Mapping[str, object] = field(default_factory=dict)


class Source(Protocol):
    """Supplies points, and is told of their progress."""

    def next(self) -> Work | None:
        """The next point to start; None if there is none now. Called again when a point has ended."""

    def left(self) -> int:
        """Upper bound of the number of further points."""

    def started(self, work: Work) -> None:
        """Called when a point was submitted."""

    def ended(self, work: Work, ending: Ending) -> None:
        """Called when a point has ended."""

    def waiting(self) -> None:
        """Called several times a second while points run."""


class Pool:
    """Runs points inside a Ray session.

    retries: attempts after losses of a point's process. at_once: largest number of running points; None sets no limit
    but the cluster's resources.
    """

    def __init__(self, retries: int = 3, at_once: int | None = None) -> None:
        self._retries, self._at_once = retries, at_once
        self._running: dict[ObjectRef, Work] = {}
        self.draining = self.stopping = False

    def run(self, source: Source) -> None:
        """Run points until the source has no more and all have ended.

        If `draining` is set meanwhile, no new points are started; if `stopping` is set, running points are cancelled.
        """
        held: Work | None = None
        demand = Demand() if grows() else None
        while not self.stopping:
            while not self.draining and self._room(1) > 0:
                held = held or source.next()
                if held is None or (self._running and not self._fits(held)):
                    break
                refusal = None if self._running else self._refusal(held)
                if refusal is not None:
                    source.started(held)
                    source.ended(held, refusal)
                    held = None
                    continue
                self._running[self._start(held)] = held
                source.started(held)
                held = None
            if demand is not None:
                if held is None or self.draining:
                    demand.end()
                else:
                    demand.ask(held.needs, self._room(1 + source.left()))
            if not self._running:
                break
            done, _ = ray.wait(list(self._running), timeout=_WAIT_SECONDS)
            for reference in done:
                source.ended(self._running.pop(reference), self._ending(reference))
            source.waiting()
        if demand is not None:
            demand.end()
        for reference, work in self._running.items():
            ray.cancel(reference, force=True)
            source.ended(work, Ending("stopped"))
        self._running = {}

    def warm_up(self, work: Work, modules: Sequence[str]) -> int:
        """Start a process for each point that fits at once, and import modules in it; returns their number."""
        count = 1
        limit = self._at_once or 2**16
        while count < limit and packs(nodes(), work.needs * (count + 1)):
            count += 1
        ray.get([self._task(_import, work).remote(modules) for _ in range(count)])
        return count

    def _start(self, work: Work) -> ObjectRef:
        return self._task(_run, work).remote(work, os.getcwd())

    def _task(self, function: Callable[..., object], work: Work) -> Any:
        return ray.remote(function).options(
            name=work.name,
            num_cpus=work.cpus,
            num_gpus=work.gpus,
            max_retries=self._retries,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(work.threads)}},
        )

    def _room(self, count: int) -> int:
        """How many of `count` points may start without exceeding `at_once`."""
        return count if self._at_once is None else min(count, self._at_once - len(self._running))

    def _fits(self, work: Work) -> bool:
        taken = [bundle for other in self._running.values() for bundle in other.needs]
        return packs(nodes(), [*taken, *work.needs])

    @staticmethod
    def _refusal(work: Work) -> Ending | None:
        """A failure if no node can run the point, for which Ray would wait for ever; else None."""
        try:
            check(work.needs, work.name)
        except UserError as error:
            return Ending("failed", error={"type": "UserError", "message": str(error)})
        return None

    @staticmethod
    def _ending(reference: ObjectRef) -> Ending:
        try:
            ending: Ending = ray.get(reference)
        except ray.exceptions.TaskCancelledError:
            return Ending("stopped")
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Ending("failed", error={"type": type(error).__name__, "message": lines[-1]})
        return ending


def _import(modules: Sequence[str]) -> None:
    """Import modules and read the environment, so that the process's first point does not have to."""
    for module in modules:
        import_module(module)
    environment()
    _collect_garbage()


def _run(work: Work, current: str) -> Ending:
    """Run a point in a process of the cluster, unless it is finished."""
    try:
        os.chdir(current)
    except OSError as error:
        message = f"the sweep was started in {current}, which is not on {platform.node()}: start it in a shared folder"
        return Ending("failed", error={"type": type(error).__name__, "message": message})
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(work.folder / _LOCK, timeout=_PATIENCE_SECONDS):
            return _run_once(work)
    except Timeout:
        message = f"another process has held the lock of {work.folder} for {_PATIENCE_SECONDS:.0f} s: wait, or end it"
        return Ending("failed", error={"type": "Timeout", "message": message})
    except OSError as error:
        return Ending("failed", error={"type": type(error).__name__, "message": str(error)})


def _run_once(work: Work) -> Ending:
    if is_finished(work.folder, work.sends):
        seconds = float(read_point(work.folder).get("seconds") or 0.0)
        return Ending("finished", seconds, repeated=True, metrics=metrics_of(work.folder))
    attempts = int(read_point(work.folder).get("attempts", 0)) + 1
    facts = {**work.facts, "name": work.name, "attempts": attempts, "process": os.getpid(), "begun": time()}
    _write_point(work.folder, {**facts, "status": "running"})
    started = perf_counter()
    error: dict[str, str] | None = None
    with journal.recording(work.folder), (work.folder / OUTPUT).open("a", encoding="utf-8") as output:
        try:
            with contextlib.redirect_stdout(output):
                work.function()
        except KeyboardInterrupt:
            raise
        except BaseException as failure:  # an error of a job fails its point, and must not end the worker process
            cause = getattr(failure, "cause", None)
            known = cause if isinstance(cause, UserError) else failure
            error = {"type": type(known).__name__, "message": " ".join(str(known).split()) or type(known).__name__}
            output.write("".join(traceback.format_exception(failure)))
    seconds = perf_counter() - started
    # Metrics are returned, because on a network folder the driver may see the report later.
    metrics = {} if error else metrics_of(work.folder)
    ending = Ending("failed" if error else "finished", seconds, error, metrics=metrics)
    _write_point(work.folder, {**facts, "status": ending.status, "seconds": seconds, "error": error})
    _collect_garbage()
    release_memory()
    return ending


def _collect_garbage() -> None:
    """Free the latest point's garbage, and exclude surviving objects from later collections, which saves 0.1 s each."""
    gc.collect()
    gc.freeze()


def is_finished(folder: Path, sends: bool) -> bool:
    """Whether a point is finished: its report is written, and with `sends` its output is uploaded."""
    return (folder / REPORT).exists() and (not sends or read_point(folder).get("status") == "finished")


def metrics_of(folder: Path) -> dict[str, Any]:
    """Metrics in the report of a run's folder; empty without a report."""
    try:
        metrics: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))["metrics"]
    except FileNotFoundError:
        return {}
    return metrics


def read_point(folder: Path) -> dict[str, Any]:
    """A point's facts and status; empty if it never started."""
    try:
        facts: dict[str, Any] = json.loads((folder / POINT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return facts


def _write_point(folder: Path, facts: Mapping[str, object]) -> None:
    unfinished = folder / f".{POINT}.{os.getpid()}"
    unfinished.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(folder / POINT)
