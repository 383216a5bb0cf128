"""Sweeps of `bench wait`: their time against the ideal, the cost of logging, SIGKILLs that lose and repeat nothing."""

import contextlib
import itertools
import json
import logging
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.jobs.common.schema import Run, option

LOG = logging.getLogger(__name__)
HEADING = "sweep: time, kills, logging"
_DRIVER, _ACTOR, _WORKER, _NODE = "driver", "actor", "worker", "node"


@dataclass
class Config(Run):
    """Measure sweeps on a Ray of two nodes with a CPU each."""

    points: int = option(24, "points of a sweep", at_least=2)
    point_seconds: float = option(1.0, "seconds that a point takes", at_least=0)
    kills: int = option(10, "SIGKILLs to deliver, of which one ends a node", at_least=0)
    loggers: int = option(8, "points that log at the same time", at_least=1)
    steps: int = option(200, "metric steps that each of them logs", at_least=1)
    logging_seconds: float = option(30.0, "seconds that each of them takes", at_least=1)
    document: str | None = option(None, "Markdown file for the table; null is docs/benchmarks.md of the checkout")


def run(config: Config) -> Path:
    """Path of the report; the tables are printed and put into the document."""
    from hasten.jobs.bench._markdown import default_document, replace_section
    from hasten.jobs.cli.compose import plain
    from hasten.jobs.common.run import start, tracked

    folder = start(config).absolute()
    with tracked(config, "bench sweep", folder) as tracker:
        tracker.params(plain(config))
        metrics = {**_time(config, folder), **_logging(config, folder), **_killed(config, folder)}
        text = _table(config, metrics)
        print(text)
        document = Path(config.document) if config.document else default_document(folder)
        replace_section(document, HEADING, text)
        return tracker.report(
            {"job": "bench", "config": plain(config), "metrics": metrics, "layers": [], "output": None}
        )


def _time(config: Config, folder: Path) -> dict[str, float]:
    """Seconds of a sweep on two CPUs from its first point's start, once with points that sleep, once that compute."""
    found = {}
    for busy in (False, True):
        kind = "computing" if busy else "sleeping"
        sweep = _command(
            folder / kind, config.points, config.point_seconds, [f"busy={str(busy).lower()}", "sweep.at_once=2"]
        )
        LOG.info("%d points of %g s, %s", config.points, config.point_seconds, kind)
        subprocess.run(sweep, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        found[f"{kind}_seconds"] = _report(folder / kind)["metrics"]["seconds"]
    ideal = -(-config.points // 2) * config.point_seconds
    return {"ideal_seconds": ideal, **found, **{f"{name}_ratio": value / ideal for name, value in found.items()}}


def _logging(config: Config, folder: Path) -> dict[str, float]:
    """Metric entries that are in MLflow, and the sweep's time with logging over that without, all points at once."""
    seconds = {}
    for steps in (0, config.steps):
        place = folder / f"logging_{steps}"
        LOG.info("%d points at once, %d steps each", config.loggers, steps)
        words = [f"steps={steps}", f"sweep.at_once={config.loggers}"]
        # Sleeping points: CPUs that Ray counts are not what is measured.
        command = _command(place, config.loggers, config.logging_seconds, words, cpus=config.loggers)
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        seconds[steps] = _report(place)["metrics"]["seconds"]
    entries = _entries(folder / f"logging_{config.steps}.db")
    return {
        "logged_entries": entries,
        "expected_entries": 2 * config.steps * config.loggers,
        "logging_ratio": seconds[config.steps] / seconds[0],
    }


def _killed(config: Config, folder: Path) -> dict[str, float]:
    """Kill drivers, workers, actors and a node of one sweep until all kills are delivered; count what came out."""
    if not config.kills:
        return {}
    from ray.cluster_utils import Cluster

    chance = random.Random(config.seed)
    kinds = [_NODE, *itertools.islice(itertools.cycle((_DRIVER, _WORKER, _ACTOR)), config.kills - 1)]
    chance.shuffle(kinds)
    place, done = folder / "killed", folder / "done"
    delivered: Counter[str] = Counter()
    starts = 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    extra = cluster.add_node(num_cpus=2)
    words = [f"done={done}", f"sweep.address={cluster.address}", "steps=5", "actor=true"]
    try:
        while True:
            starts += 1
            driver = subprocess.Popen(
                _command(place, config.points, config.point_seconds, words), cwd=folder, stdout=subprocess.DEVNULL
            )
            while driver.poll() is None and kinds:
                time.sleep(chance.uniform(1.0, 3.0))
                if driver.poll() is not None or not _running(place):
                    continue
                if kinds[-1] == _NODE:
                    cluster.remove_node(extra, allow_graceful=False)
                    extra = cluster.add_node(num_cpus=2)
                elif kinds[-1] == _DRIVER:
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                elif not _kill_one(_actors() if kinds[-1] == _ACTOR else _running(place), chance):
                    continue
                delivered[kinds.pop()] += 1
                LOG.info("killed: %s", ", ".join(f"{count} {kind}" for kind, count in sorted(delivered.items())))
            if driver.wait() == 0:
                break
            if driver.returncode not in (1, -signal.SIGKILL):
                raise RuntimeError(f"the sweep ended with {driver.returncode}")
        if kinds:
            LOG.warning("the sweep ended before %d of the kills", len(kinds))
    finally:
        cluster.shutdown()
    ended = Counter(done.read_text().split())
    return {
        "kills": sum(delivered.values()),
        **{f"killed_{kind}s": count for kind, count in delivered.items()},
        "sweep_starts": starts,
        "points_ended": len(ended),
        "points_ended_twice": sum(count > 1 for count in ended.values()),
        "points_in_mlflow": len(_children(folder / "killed.db")),
        "different_points_in_mlflow": len(set(_children(folder / "killed.db"))),
    }


def _command(place: Path, points: int, seconds: float, words: Sequence[str], cpus: int | None = None) -> list[str]:
    """A sweep in a folder, with a store of its own beside it; cpus: of a local Ray, None is what the machine has."""
    own = [f"run_dir={place}", f"tracking.uri=sqlite:///{place}.db", f"wait_seconds={seconds}"]
    command = [
        sys.executable,
        "-m",
        "hasten",
        "bench",
        "wait",
        "--multirun",
        f"point=range(0,{points})",
        *own,
        *words,
    ]
    return command if cpus is None else [*command, f"sweep.cpus={cpus}"]


def _running(place: Path) -> list[int]:
    """Processes of points that run."""
    from hasten.cluster.programs.sweep_points import read_point

    facts = [read_point(path) for path in place.glob("points/*")]
    return [fact["process"] for fact in facts if fact.get("status") == "running"]


def _actors() -> list[int]:
    """Processes of the points' actors, on the cluster of this process."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("Waiter" in word for word in process.cmdline()[:1]):
                found.append(process.pid)
    return found


def _kill_one(processes: Sequence[int], chance: random.Random) -> bool:
    """SIGKILL to one of these processes that is there; False where none is."""
    import psutil

    for process in chance.sample(processes, len(processes)):
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(process)
            # The id may be another's by now: a killed driver leaves points that say they run.
            if found.cmdline()[:1] and found.cmdline()[0].startswith("ray::"):
                found.kill()
                return True
    return False


def _report(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "report.json").read_text(encoding="utf-8"))
    return found


def _entries(file: Path) -> int:
    with sqlite3.connect(file) as database:
        query = "select count(*) from metrics where key in ('step', 'square')"
        return int(database.execute(query).fetchone()[0])


def _children(file: Path) -> list[str]:
    """Points of the runs in a store that were not deleted and are finished."""
    query = (
        "select params.value from params join runs on runs.run_uuid = params.run_uuid "
        "where params.key = 'point' and runs.lifecycle_stage = 'active' and runs.status = 'FINISHED' "
        "and runs.run_uuid in (select run_uuid from tags where key = 'hasten.point')"
    )
    with sqlite3.connect(file) as database:
        return [str(value) for (value,) in database.execute(query)]


def _table(config: Config, metrics: Mapping[str, float]) -> str:
    from hasten.jobs.bench._markdown import provenance, table

    rows = []
    for kind in ("sleeping", "computing"):
        ratio = f"{metrics[f'{kind}_seconds_ratio']:.3f} of the ideal"
        name = f"{config.points} points of {config.point_seconds:g} s, two at once, {kind}"
        rows.append([name, f"{metrics[f'{kind}_seconds']:.2f} s", ratio])
    rows.append(
        [
            f"{config.loggers} points that log {config.steps} steps of 2 metrics at once",
            f"{metrics['logged_entries']:.0f} of {metrics['expected_entries']:.0f} entries",
            f"{100 * (metrics['logging_ratio'] - 1):+.2f} % of the time",
        ]
    )
    if config.kills:
        kinds = ", ".join(f"{metrics[name]:.0f} {name[7:]}" for name in sorted(metrics) if name.startswith("killed_"))
        rows.append(
            [
                f"{metrics['kills']:.0f} SIGKILLs ({kinds}), {metrics['sweep_starts']:.0f} starts",
                f"{metrics['points_ended']:.0f} points ended, {metrics['points_ended_twice']:.0f} of them twice",
                f"{metrics['points_in_mlflow']:.0f} runs in MLflow, {metrics['different_points_in_mlflow']:.0f} points",
            ]
        )
    return f"{provenance()}\n\n" + table(["sweep of `bench wait`", "measured", ""], rows)
