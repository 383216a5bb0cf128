"""The points of a sweep as Ray tasks: as many at once as fit, each finished exactly once despite losses.

A point is finished when its folder has a report.json, which its job writes last. Whoever starts a point (a driver, or
Ray after the loss of a process or node) looks for that file first, while it holds the folder's lock.
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
# A process that lost its driver ends within seconds; the next one waits so long for the folder's lock.
_PATIENCE_SECONDS = 60.0
_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """One point: what is run, where, and what it takes.

    facts: written to the folder's point.json. cpus and gpus: of the process that runs it; bundles: what it starts in
    the cluster itself. sends: what it made goes to a store after its report was written.
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
        """Everything that it takes of the cluster while it runs."""
        bundles = ({"CPU": self.cpus, "GPU": self.gpus}, *self.bundles)
        found = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
        return [bundle for bundle in found if bundle]


@dataclass(frozen=True)
class Ending:
    """How a point ended: finished, failed or stopped.

    error: type and message; repeated: it was finished before; metrics: of its report.
    """

    status: str
    seconds: float = 0.0
    error: Mapping[str, str] | None = None
    repeated: bool = False
    metrics: Mapping[str, object] = field(default_factory=dict)


class Source(Protocol):
    """Where points come from."""

    def next(self) -> Work | None:
        """The next point to start, None where there is none now; asked again when one has ended."""

    def left(self) -> int:
        """How many more it may give."""

    def started(self, work: Work) -> None:
        """A point was handed to the cluster."""

    def ended(self, work: Work, ending: Ending) -> None:
        """A point has come to its end."""

    def waiting(self) -> None:
        """Called several times a second while points run."""


class Pool:
    """Runs points inside a Ray session. retries: after the loss of a point's process; at_once: None is what fits."""

    def __init__(self, retries: int = 3, at_once: int | None = None) -> None:
        self._retries, self._at_once = retries, at_once
        self._running: dict[ObjectRef, Work] = {}
        self.draining = self.stopping = False

    def run(self, source: Source) -> None:
        """Run points until the source has none and none runs; with `draining` no new ones, with `stopping` none."""
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
        """Start as many processes as points like this one fit at once, with these modules; returns how many."""
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
        """How many of so many points may start, by `at_once` alone."""
        return count if self._at_once is None else min(count, self._at_once - len(self._running))

    def _fits(self, work: Work) -> bool:
        taken = [bundle for other in self._running.values() for bundle in other.needs]
        return packs(nodes(), [*taken, *work.needs])

    @staticmethod
    def _refusal(work: Work) -> Ending | None:
        """How a point ends that no node can run: Ray would wait for ever."""
        try:
            check(work.needs, work.name)
        except UserError as error:
            return Ending("failed", error={"type": "UserError", "message": str(error)})
        return None

    @staticmethod
    def _ending(reference: ObjectRef) -> Ending:
        try:
            found: Ending = ray.get(reference)
        except ray.exceptions.TaskCancelledError:
            return Ending("stopped")
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Ending("failed", error={"type": type(error).__name__, "message": lines[-1]})
        return found


def _import(modules: Sequence[str]) -> None:
    """Do once what the first point of a process would wait for."""
    for module in modules:
        import_module(module)
    environment()
    _collect_garbage()


def _run(work: Work, current: str) -> Ending:
    """In a process of the cluster: run a point that is not finished."""
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
        message = f"another process still works in {work.folder} after {_PATIENCE_SECONDS:.0f} s"
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
        except BaseException as failure:  # whatever a job raises ends this point and no other
            cause = getattr(failure, "cause", None)
            known = cause if isinstance(cause, UserError) else failure
            error = {"type": type(known).__name__, "message": " ".join(str(known).split()) or type(known).__name__}
            output.write("".join(traceback.format_exception(failure)))
    seconds = perf_counter() - started
    # The report itself may not be seen at once where the driver is, in a folder on the network.
    metrics = {} if error else metrics_of(work.folder)
    ending = Ending("failed" if error else "finished", seconds, error, metrics=metrics)
    _write_point(work.folder, {**facts, "status": ending.status, "seconds": seconds, "error": error})
    _collect_garbage()
    release_memory()
    return ending


def _collect_garbage() -> None:
    """Free what the latest point left; modules and whatever else is left then is not looked at again, for 0.1 s."""
    gc.collect()
    gc.freeze()


def is_finished(folder: Path, sends: bool) -> bool:
    """Whether a point has come to its end: its report is written, and what it made is sent where it `sends`."""
    return (folder / REPORT).exists() and (not sends or read_point(folder).get("status") == "finished")


def metrics_of(folder: Path) -> dict[str, Any]:
    """Metrics in the report of a run's folder; none where it has no report."""
    try:
        found: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))["metrics"]
    except FileNotFoundError:
        return {}
    return found


def read_point(folder: Path) -> dict[str, Any]:
    """A point's facts and state; empty where it never began."""
    try:
        found: dict[str, Any] = json.loads((folder / POINT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _write_point(folder: Path, facts: Mapping[str, object]) -> None:
    unfinished = folder / f".{POINT}.{os.getpid()}"
    unfinished.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(folder / POINT)
